"""The web demo: a picture and a question in, what base and tuned model say side by side out; a folder of pictures in,
captions and an adapter out; and what was gained on the held-out pictures of a run.

Made to be shown to a colleague, and safe by default: on this machine only, no other host name accepted,
nothing sent to anybody, uploads and answers bounded, and what a model says shown as plain text alone.
"""

import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.themes import Default
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_lora.demo.folder import WholeFolder
from vlm_lora.demo.inputs import KEPT_SECONDS, UPLOADS, Roots, plainly, short
from vlm_lora.demo.runs import Evaluations, Pictures, find_runs
from vlm_lora.demo.speaker import MAX_WAITING, Speaker
from vlm_lora.demo.tabs import QUIETLY, Desk, OnePicture, WhatChanged, choices
from vlm_lora.demo.training import Training
from vlm_lora.errors import ConfigError

if TYPE_CHECKING:
    from vlm_lora import Captioner

LOOPBACK = ("127.0.0.1", "localhost")
SHARED = "*.gradio.live"
"""Where gradio's public links lead to."""
MAX_UPLOAD = "20mb"

SCRIPT, STYLE, LEARNING, REPORT = (
    resources.files("vlm_lora").joinpath(name).read_text("utf-8")
    for name in ("demo/page.js", "demo/page.css", "inference/templates/learning.css", "inference/templates/report.css")
)
STYLE = f".report {{ {REPORT} }}\n{LEARNING}{STYLE}"  # what is the report's looks as it does there

IF_OPEN = """adapter => {
  if (!document.querySelector('#changed')?.offsetParent) throw new Error('nobody looks');
  return adapter;
}"""


def launch(  # arguments: the flags of `vlm-lora demo`
    model: str | None = None,
    adapter: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    *,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    without_auth: bool = False,
    allowed_hosts: Sequence[str] = (),
    roots: Sequence[str | Path] = (),
    allow_training: bool = False,
    block: bool = True,
) -> "Page":
    """Serve the demo; the page is up before the model is loaded.

    Args:
        adapter: a run's held-out pictures become examples, and the runs beside it can be chosen on the page. None: base
            alone, until one of the runs in ``runs`` is chosen.
        port: None takes the first free one from 7860.
        allowed_hosts: further names under which the demo is reached. On loopback all others are refused: a web page
            could point its own name at the demo, and read what it shows.
        block: stay until Ctrl-C.

    Raises:
        ConfigError: the port is taken, the host is none of this machine's, the adapter is not there, there is no
            public link to be had, or the demo would be open to others and there is no ``auth``.
        VlmLoraError: the model or the adapter cannot be loaded.
    """
    local = _is_loopback(host)
    if (share or not local) and not auth and not without_auth:
        flag, whom = ("--share", "the internet") if share else (f"--host {host}", "whoever can reach this machine")
        raise ConfigError(
            f"{flag} opens the demo to {whom}. Give a user and a password with --auth, or say --no-auth if "
            "that is what you want."
        )
    if port is not None and not 0 < port < 2**16:
        raise ConfigError(f"--port {port}: is no port. Give one from 1 to 65535.")
    trains = allow_training or (local and not share and not allowed_hosts)
    runs = find_runs(adapter)
    place = next((run.parent for run in runs.values() if run.is_dir()), Path("runs").resolve())
    training = (_roots(roots, trains, place / UPLOADS), place) if trains or roots else None
    loading: Future = Future()
    base = Path(model).name if model else "the base model"  # names alone: the page shows no path
    chosen = next(iter(runs)) if adapter else ""
    what = f"{base} with {chosen}" if adapter else base
    # Else uploads would stay. A script's background job begins with the second one ignored.
    numbers = (signal.SIGTERM, signal.SIGINT) if block and threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    app = build_app(loading, runs=runs, chosen=chosen, loading=what, training=training)
    for number, before in handlers.items():
        app.at_close.callback(signal.signal, number, before or signal.SIG_DFL)
    hosts = [*LOOPBACK, *([_in_url(host)] if local else []), *allowed_hosts, *([SHARED] if share else [])]
    try:
        _open(app, host, port, auth, safe_settings(hosts if local or allowed_hosts else ["*"], share))
        public = f" and, for anyone, on {app.share_url}" if share else ""
        print(f"The demo is on {app.local_url}{public}, loading {what}. Ctrl-C ends it.", file=sys.stderr, flush=True)
        from vlm_lora import Captioner  # now, as it brings torch

        loading.set_result(Captioner.load(model, adapter))
        print("Ready.", file=sys.stderr, flush=True)
        if block:
            app.block_thread()
            app.close()
    except BaseException:
        app.close()
        raise
    return app


class Page(gr.Blocks):
    """Gradio's blocks, whose `close` also leaves the contexts in ``at_close``: a folder of ``files``, the environment.
    What is asked and goes wrong is told in a sentence, without the paths ``of_this_machine``."""

    def __init__(self, **settings):
        self.at_close, self.of_this_machine = ExitStack(), list[Path]()
        files = tempfile.TemporaryDirectory(prefix="vlm-lora-demo-", ignore_cleanup_errors=True)
        self.files = Path(self.at_close.enter_context(files))
        # Gradio switches the first off for the whole process, and has uploads in a folder that outlives the demo.
        before = {name: os.environ.get(name) for name in ("HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR")}
        self.at_close.callback(_set_variables, before)
        os.environ["GRADIO_TEMP_DIR"] = str(self.files / "gradio")
        super().__init__(**settings)

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.at_close.close()

    async def process_api(self, *given, **more) -> dict[str, Any]:
        try:
            return await super().process_api(*given, **more)
        except Exception as error:
            told = plainly(error)
            told.message = short(told.message, *self.of_this_machine)
            raise told from None


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def build_app(
    captioner: "Captioner | Future[Captioner]",
    *,
    runs: Mapping[str, Path] | None = None,
    chosen: str = "",
    loading: str = "the model",
    training: tuple[Roots, Path] | None = None,
) -> Page:
    """The page, to be launched with `safe_settings`; a future of the captioner, so that it is there while that loads.

    Args:
        runs: folders of the adapters that can be chosen, by name. The captioner has the one that is ``chosen``.
        training: from where pictures may be taken to train on, and where runs are written; None: nobody trains here.
    """
    future: Future = captioner if isinstance(captioner, Future) else Future()
    if future is not captioner:
        future.set_result(captioner)
    runs, started = dict(runs or {}), time.monotonic()

    with Page(title="vlm-lora", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        pictures = Pictures(app.files)
        roots, place = training or (Roots([], app.files / UPLOADS, passing=True), None)
        app.of_this_machine = [roots.uploads, *roots.folders.values(), *([place] if place else []), *runs.values()]
        gr.Markdown("# What does the model say?")
        bare: dict[str, Any] = {"show_label": False, "container": False, "interactive": False, "elem_id": "status"}
        text = f"Loading {loading}. You can choose a picture already."
        status = gr.Textbox(text, visible=not future.done(), **bare)
        several = [*runs] != [chosen] and bool(runs)
        adapter = gr.Dropdown(choices(runs, chosen), value=chosen, label="Adapter", visible=several)
        desk = Desk(Speaker(future, runs, chosen), Evaluations(runs), pictures, adapter, app.at_close)
        with gr.Tabs(selected="picture" if chosen or not training else "train"):
            if place:
                with gr.Tab("Train", id="train"):
                    Training(app, desk, roots, place)
            with gr.Tab("Picture", id="picture"):
                one = OnePicture(desk)
            with gr.Tab("Pictures"):
                folder = WholeFolder(app, desk, roots)
            with gr.Tab("What changed") as changed_opened:
                changed = WhatChanged(desk)

        timer = gr.Timer(1, active=not future.done())
        outputs = [status, timer, *one.outputs, folder.prompt]

        def look(adapter: str) -> list:
            """How far the loading is: on opening the page, and once a second until it is done."""
            if not future.done():
                text = f"Loading {loading}: {time.monotonic() - started:.0f} s. You can choose a picture already."
                return [text, *[gr.skip()] * (len(outputs) - 1)]
            shown = one.show(adapter)
            return [gr.Textbox(visible=False), gr.Timer(active=False), *shown, shown[0]]

        gr.on([app.load, timer.tick, adapter.change], look, adapter, outputs, queue=False, **QUIETLY)
        # An evaluation takes long to draw: that is done when somebody looks.
        shown: dict[str, Any] = {"fn": changed.show, "inputs": adapter, "outputs": changed.outputs, "queue": False}
        changed_opened.select(**shown, show_progress="minimal", api_visibility="private")
        adapter.change(**shown, js=IF_OPEN, **QUIETLY)
    app.queue(max_size=4 * MAX_WAITING, default_concurrency_limit=1)
    return app


def _open(app: "Page", host: str, port: int | None, auth: tuple[str, str] | None, settings: dict[str, Any]) -> None:
    """Raises ConfigError where the demo cannot be served as it is wanted."""
    try:
        app.launch(server_name=_in_url(host), server_port=port, auth=auth, **settings)
    except OSError as error:
        try:  # on any port
            socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except OSError:
            raise ConfigError(f"--host {host}: is no address of this machine. Leave it out, or give one.") from error
        raise ConfigError(f"--port {port}: in use, or not allowed on {host}. Give another one.") from error
    if settings["share"] and not app.share_url:
        raise ConfigError("--share: gradio gave no public link; is there a way to the internet? Or leave it out.")


def _roots(folders: Sequence[str | Path], trains: bool, uploads: Path) -> Roots:
    """Raises ConfigError for what is no folder, for two of one name, and where nobody may train."""
    if not trains:
        raise ConfigError(
            "--roots lets whoever opens the page read pictures and write captions there, and train. The demo is open "
            "to others: say --allow-training if they may."
        )
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if missing := [folder for folder, path in zip(folders, paths, strict=True) if not path.is_dir()]:
        raise ConfigError(f"--roots {missing[0]}: there is no such folder. Give one that holds folders of pictures.")
    if len({UPLOADS, *(path.name for path in paths)}) <= len(paths):
        raise ConfigError(
            f"--roots: two folders of one name (or one called {UPLOADS!r}, as the page has) cannot be told apart "
            "on the page; give the one above."
        )
    return Roots(paths, uploads)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


class OwnPages:
    """Refuses what another web page sends; its browser says where it comes from. The name under which a proxy was asked
    takes the place of the host's, and is so checked in the same way."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            if forwarded := headers.get("x-forwarded-host"):
                headers["host"] = forwarded.partition(",")[0].strip()
            origin = headers.get("origin")
            if origin and (_name_in(origin) or "null") != _name_in(f"//{headers.get('host')}"):
                answer = PlainTextResponse("This comes from another web page.", 403)
        await answer(scope, receive, send)


def _name_in(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half an IPv6 address, say
        return None


def safe_settings(hosts: Sequence[str], share: bool = False) -> dict[str, Any]:
    """Arguments of `gr.Blocks.launch`: all of them, as environment variables could turn on what is left out."""
    names = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    off = ("show_error", "enable_monitoring", "run_history", "mcp_server", "ssr_mode", "pwa")
    return dict.fromkeys(off, False) | {
        "share": share,
        "app_kwargs": {"middleware": [names, Middleware(OwnPages), names]},
        "max_file_size": MAX_UPLOAD,
        "max_threads": MAX_WAITING + 8,  # so that those who wait for the model keep nobody else waiting
        "allowed_paths": [],
        "strict_cors": True,
        "footer_links": ["api"],
        "prevent_thread_lock": True,
        "quiet": True,
        "theme": Default(primary_hue="blue", font=("system-ui", "sans-serif")),
        "css": STYLE,
        "js": SCRIPT,
    }
