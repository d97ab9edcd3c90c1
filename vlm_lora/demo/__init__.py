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
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradio.themes import Default
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_lora.demo.page import SCRIPT, STYLE, Page, build_app, set_variable
from vlm_lora.demo.runs import find_runs
from vlm_lora.demo.speaker import MAX_WAITING
from vlm_lora.demo.uploads import UPLOADS, Roots
from vlm_lora.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost")
SHARED = "*.gradio.live"
"""Where gradio's public links lead to."""
MAX_UPLOAD = "20mb"


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
) -> Page:
    """Serve the demo; the page is up before the model is loaded.

    Args:
        adapter: a run's held-out pictures become examples, and the runs beside it can be chosen on the page. None: base
            alone, until one of the runs in ``runs`` is chosen.
        port: None takes the first free one from 7860.
        auth: user and password.
        without_auth: insist on sharing, or on another host than loopback, with no password.
        allowed_hosts: further names under which the demo is reached, behind a proxy say. On loopback all
            others are refused: a web page could point its own name at the demo, and read what it shows.
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
    with ExitStack() as undo:
        if block and threading.current_thread() is threading.main_thread():
            # Else uploads would stay. A script's background job begins with the second one ignored.
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, signal.default_int_handler)
                undo.callback(signal.signal, number, before or signal.SIG_DFL)
        # By default uploads lie in a folder that outlives the demo.
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="vlm-lora-demo-", ignore_cleanup_errors=True))
        undo.callback(set_variable, "GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR"))
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = build_app(loading, runs=runs, chosen=chosen, loading=what, training=training)
        app.at_close.enter_context(undo.pop_all())
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


def _open(app: Page, host: str, port: int | None, auth: tuple[str, str] | None, settings: dict[str, Any]) -> None:
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
