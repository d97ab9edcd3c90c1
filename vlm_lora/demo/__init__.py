"""The web demo: a picture and a question in, what base and tuned model say side by side out; a folder of pictures in,
captions and an adapter out; and what was gained on the held-out pictures of a run.

Made to be shown to a colleague, and safe by default: on this machine only, no other host name accepted,
nothing sent to anybody, uploads and answers bounded, and what a model says shown as plain text alone.
"""

import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Default
from markupsafe import Markup
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_lora.console import to_stderr
from vlm_lora.demo.captions import WholeFolder
from vlm_lora.demo.folders import KEPT_SECONDS, UPLOADS, Roots
from vlm_lora.demo.inputs import plainly
from vlm_lora.demo.runs import Evaluations, Pictures, find_runs
from vlm_lora.demo.speaker import MAX_WAITING, Speaker
from vlm_lora.demo.tabs import QUIETLY, Desk, OnePicture, WhatChanged
from vlm_lora.demo.training import Training
from vlm_lora.errors import ConfigError

if TYPE_CHECKING:
    from vlm_lora import Captioner

LOOPBACK = ("127.0.0.1", "localhost")

SCRIPT, STYLE, LEARNING, REPORT = (
    resources.files("vlm_lora").joinpath(name).read_text("utf-8")
    for name in ("demo/page.js", "demo/page.css", "inference/templates/learning.css", "inference/templates/report.css")
)
STYLE = f".report {{ {REPORT} }}\n{LEARNING}{STYLE}"  # what is the report's looks as it does there

IF_OPEN = (
    "who => { if (document.querySelector('#changed')?.offsetParent) return who; throw new Error('nobody looks'); }"
)


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
    local = re.fullmatch(r"localhost|127(\.[0-9]{1,3}){3}|::1", host) is not None
    if (share or not local) and not auth and not without_auth:
        flag, whom = ("--share", "the internet") if share else (f"--host {host}", "whoever can reach this machine")
        raise ConfigError(f"{flag} opens the demo to {whom}. Give a user and a password with --auth, or say --no-auth.")
    if port is not None and not 0 < port < 2**16:
        raise ConfigError(f"--port {port}: is no port. Give one from 1 to 65535.")
    trains = allow_training or (local and not share and not allowed_hosts)
    runs = find_runs(adapter)
    place = next((run.parent for run in runs.values() if run.is_dir()), Path("runs").resolve())
    given = _roots(roots, trains, place / UPLOADS) if trains or roots else None
    loading: Future = Future()
    base = Path(model).name if model else "the base model"  # names alone: the page shows no path
    chosen = next(iter(runs)) if adapter else ""
    what = f"{base} with {chosen}" if adapter else base
    # Else uploads would stay. A script's background job begins with the second one ignored.
    numbers = (signal.SIGTERM, signal.SIGINT) if block and threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    app = build_app(loading, runs=runs, chosen=chosen, loading=what, roots=given)
    for number, before in handlers.items():
        app.at_close.callback(signal.signal, number, before or signal.SIG_DFL)
    hosts = [
        *LOOPBACK,
        *([host.replace("::1", "[::1]")] if local else []),
        *allowed_hosts,
        *(["*.gradio.live"] if share else []),
    ]
    try:
        _open(app, host, port, auth, safe_settings(hosts if local or allowed_hosts else ["*"], share))
        public = f" and, for anyone, on {app.share_url}" if share else ""
        to_stderr(f"The demo is on {app.local_url}{public}, loading {what}. Ctrl-C ends it.")
        from vlm_lora import Captioner  # now, as it brings torch

        loading.set_result(Captioner.load(model, adapter))
        to_stderr("Ready.")
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
        changed = ("HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR")
        self.at_close.callback(os.environ.update, {name: os.environ[name] for name in changed if name in os.environ})
        for name in changed:
            self.at_close.callback(os.environ.pop, name, None)  # which comes before that
        os.environ["GRADIO_TEMP_DIR"] = str(self.files / "gradio")
        super().__init__(**settings)

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.at_close.close()

    async def process_api(self, *given, **more) -> dict[str, Any]:
        try:
            return await super().process_api(*given, **more)
        except Exception as error:
            raise plainly(error, *self.of_this_machine) from None


def build_app(
    first: "Future[Captioner]",
    *,
    runs: Mapping[str, Path] | None = None,
    chosen: str = "",
    loading: str = "the model",
    roots: Roots | None = None,
) -> Page:
    """The page, to be launched with `safe_settings`; it is there while the captioner loads.

    Args:
        runs: folders of the adapters that can be chosen, by name. The captioner has the one that is ``chosen``.
        roots: from where pictures may be taken to train on; runs are written beside its uploads. None: nobody trains.
    """
    runs, started, trains = dict(runs or {}), time.monotonic(), roots is not None

    def so_far() -> Markup:
        text = Markup("<p>Loading {}: {:.0f} s. You can choose a picture already.</p>")
        return text.format(loading, time.monotonic() - started)

    with Page(title="vlm-lora", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        roots = roots or Roots([], app.files / UPLOADS, passing=True)
        app.of_this_machine = [roots.uploads, *roots.folders.values(), *runs.values()]
        gr.Markdown("# What does the model say?")
        status = gr.HTML(so_far(), visible=not first.done(), elem_id="status")
        several, speaker = bool(runs) and [*runs] != [chosen], Speaker(first, runs, chosen)
        adapter = gr.Dropdown(speaker.choices(), value=chosen, label="Adapter", visible=several)
        desk = Desk(speaker, Evaluations(runs), Pictures(app.files), adapter, app.at_close)
        with gr.Tabs(selected="picture" if chosen or not trains else "train"):
            if trains:
                with gr.Tab("Train", id="train"):
                    Training(app, desk, roots)
            with gr.Tab("Picture", id="picture"):
                one = OnePicture(desk)
            with gr.Tab("Pictures"):
                folder = WholeFolder(app, desk, roots)
            with gr.Tab("What changed") as changed_opened:
                changed = WhatChanged(desk)

        timer = gr.Timer(1, active=not first.done())
        outputs = [status, timer, *one.outputs, folder.prompt]

        def look(adapter: str) -> list:
            """How far the loading is: on opening the page, and once a second until it is done."""
            if not first.done():
                return [so_far(), *[gr.skip()] * (len(outputs) - 1)]
            shown = one.show(adapter)
            return [gr.HTML(visible=False), gr.Timer(active=False), *shown, shown[0]]

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
        app.launch(server_name=f"[{host}]" if ":" in host else host, server_port=port, auth=auth, **settings)
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
        raise ConfigError("--roots: others could train, read and write there. If they may, say --allow-training too.")
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if missing := [folder for folder, path in zip(folders, paths, strict=True) if not path.is_dir()]:
        raise ConfigError(f"--roots {missing[0]}: there is no such folder. Give one that holds folders of pictures.")
    if len({UPLOADS, *(path.name for path in paths)}) <= len(paths):
        raise ConfigError(f"--roots: two folders of one name, or one called {UPLOADS!r}; give the one above them.")
    return Roots(paths, uploads)


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
            own, origin = (re.sub(r"^https?://|:\d+$", "", headers.get(name, "")) for name in ("host", "origin"))
            if "origin" in headers and origin != own:
                answer = PlainTextResponse("This comes from another web page.", 403)
        await answer(scope, receive, send)


def safe_settings(hosts: Sequence[str], share: bool = False) -> dict[str, Any]:
    """Arguments of `gr.Blocks.launch`: all of them, as environment variables could turn on what is left out."""
    names = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    off = ("show_error", "enable_monitoring", "run_history", "mcp_server", "ssr_mode", "pwa")
    return dict.fromkeys(off, False) | {
        "share": share,
        "app_kwargs": {"middleware": [names, Middleware(OwnPages), names]},
        "max_file_size": "20mb",
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
