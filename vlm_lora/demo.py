"""The web demo: a picture and a question in, what base and tuned model say side by side out.

Made to be shown to a colleague, and safe by default: on this machine only, no other host name accepted,
nothing sent to anybody, uploads and answers bounded, and what a model says shown as plain text alone.
"""

import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vlm_lora import ImageRef, VlmLoraError, load_image, read_dataset
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT, read_yaml
from vlm_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_lora import Captioner

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost")
MAX_UPLOAD = "20mb"
MAX_WAITING = 16
"""Requests in the queue; whoever comes then is told so."""
MAX_NEW_TOKENS = 512
MAX_PROMPT = 2000
"""Characters."""
MAX_SECONDS = 120
"""For one request, both models together."""
KEPT_SECONDS = 3600
"""Uploaded pictures are deleted after that long, and when the demo ends."""
EXAMPLES = 8
BROWSER_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class DemoExample:
    """A picture to click on: what is asked about it, and what the data says."""

    image: ImageRef
    prompt: str
    references: tuple[str, ...]


class _WithoutStub(type(gr.Image)):
    """Gradio writes a .pyi file beside the source of a new component; a package does not change itself."""

    def __new__(mcs, name, bases, attributes):
        return ABCMeta.__new__(mcs, name, bases, attributes)


class SafeImage(gr.Image, metaclass=_WithoutStub):
    """An image input whose pictures go through our loader: a bad one gives a plain sentence."""

    is_template = True  # drawn in the browser as gr.Image is

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if str(url_or_file_path).startswith(("http:", "https:")):  # what the API would have the server fetch
            raise gr.Error("Web addresses are not fetched. Send the picture itself.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload) -> ImageRef | None:
        if payload is None:
            return None
        if not payload.path:
            raise gr.Error("The picture did not arrive. Choose it again.", print_exception=False)
        # By reference, so that both models share what the tower made of it.
        picture = ImageRef(path=Path(payload.path), name=Path(payload.orig_name or "the picture").name)
        try:
            load_image(picture)
        except DataError as error:
            raise _plainly(error) from None
        return picture


def launch(
    model: str | None = None,
    adapter: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    *,
    auth: tuple[str, str] | None = None,
    without_auth: bool = False,
    allowed_hosts: Sequence[str] = (),
    block: bool = True,
) -> gr.Blocks:
    """Serve the demo; the page is up before the model is loaded.

    Args:
        model: base model; by default the one the adapter names.
        adapter: run folder or adapter folder; a run's held-out pictures become examples. None: base alone.
        host: address to listen on. Whoever can reach it can use the demo.
        port: None takes the first free one from 7860.
        auth: user and password, asked for on the page.
        without_auth: insist on another host than loopback with no password.
        allowed_hosts: further names under which the demo is reached, behind a proxy say. On loopback all
            others are refused: a web page could point its own name at the demo, and read what it shows.
        block: stay until Ctrl-C.

    Raises:
        ConfigError: the port is taken, or the host is not loopback and there is no ``auth``.
        VlmLoraError: the model or the adapter cannot be loaded.
    """
    if host not in LOOPBACK and not auth and not without_auth:
        raise ConfigError(
            f"--host {host} opens the demo to whoever can reach this machine. Give a user and a password, or "
            "stay on 127.0.0.1."
        )
    folder = tempfile.TemporaryDirectory(prefix="vlm-lora-demo-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # by default uploads lie in a folder that outlives the demo
    loading: Future = Future()
    base = Path(model).name if model else "the base model"  # names alone: the page shows no path
    what = f"{base} with {Path(adapter).resolve().name}" if adapter else base
    app = build_app(loading, examples=find_examples(adapter), compare=adapter is not None, loading=what)
    app.folder = folder  # deleted with the app
    hosts = [*LOOPBACK, *allowed_hosts] if host in LOOPBACK or allowed_hosts else ["*"]
    try:
        app.launch(server_name=host, server_port=port, auth=auth, **safe_settings(hosts))
    except OSError as error:
        raise ConfigError(f"--port {port}: in use, or not allowed on {host}. Give another one.") from error
    print(f"The demo is on {app.local_url}, loading {what}. Ctrl-C ends it.", file=sys.stderr)
    try:
        from vlm_lora import Captioner  # now, as it brings torch

        loading.set_result(Captioner.load(model, adapter))
        print("Ready.", file=sys.stderr)
        if block:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # else uploads would stay behind
            app.block_thread()
    except BaseException:
        app.close(verbose=False)
        raise
    return app


def safe_settings(hosts: Sequence[str]) -> dict:
    """What `gr.Blocks.launch` is to be called with; all said, as environment variables could turn them on."""
    return {
        "share": False,
        "app_kwargs": {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]},
        "max_file_size": MAX_UPLOAD,
        "max_threads": 8,
        "allowed_paths": [],
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "strict_cors": True,
        "footer_links": ["api"],
        "prevent_thread_lock": True,
        "quiet": True,
        "css": CSS,
    }


# -- the page ------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { max-width: 70rem !important; margin: auto !important; }
#status textarea { font-weight: 600; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.answer .error { display: none; } /* the toast says what is wrong */
"""


def build_app(
    captioner: "Captioner | Future[Captioner]",
    *,
    examples: Sequence[DemoExample] = (),
    compare: bool | None = None,
    loading: str = "the model",
) -> gr.Blocks:
    """The page, to be launched with `safe_settings`.

    Args:
        captioner: or a future of it, so that the page is there while it loads.
        compare: show base beside tuned; by default if the captioner has an adapter.
        loading: what the page says is being loaded.
    """
    future = captioner if isinstance(captioner, Future) else Future()
    if future is not captioner:
        future.set_result(captioner)
        compare = captioner.adapter is not None if compare is None else compare
    speaker = _Speaker(future, bool(compare))
    started = time.monotonic()
    files = tempfile.TemporaryDirectory(prefix="vlm-lora-examples-", ignore_cleanup_errors=True)
    shown = _with_files(examples, Path(files.name))

    with gr.Blocks(title="vlm-lora", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown("# What does the model say?")
        status = gr.Textbox(
            f"Loading {loading}. You can choose a picture already.",
            visible=not future.done(),
            interactive=False,
            show_label=False,
            container=False,
            elem_id="status",
        )
        with gr.Row():
            with gr.Column(min_width=300):
                image = SafeImage(
                    label="Picture",
                    elem_id="picture",
                    sources=["upload", "clipboard", "webcam"],
                    buttons=["fullscreen"],
                    placeholder="Drop a picture here, or choose one",
                    height=320,
                )
                prompt = gr.Textbox(
                    "",
                    label="Question or instruction",
                    placeholder=_unasked(future),
                    max_length=MAX_PROMPT,
                    max_lines=6,
                )
                with gr.Row():
                    go = gr.Button("Caption or answer", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=80, scale=0)
                with gr.Accordion("Advanced", open=False):
                    numbers = [
                        gr.Slider(1, MAX_NEW_TOKENS, DEFAULT_MAX_NEW_TOKENS, step=1, label="Most tokens"),
                        gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest word)"),
                        gr.Slider(0.05, 1, 1, step=0.05, label="Top p (only with a temperature)"),
                        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
                    ]
            with gr.Column(min_width=300):
                reference = gr.Textbox(label="What the data says", visible=False, interactive=False)
                with gr.Row():
                    base = gr.Textbox(
                        label="Base" if compare else "Answer",
                        lines=4,
                        interactive=False,
                        buttons=["copy"],
                        min_width=200,
                        elem_classes="answer",
                    )
                    tuned = gr.Textbox(
                        label="Tuned",
                        lines=4,
                        interactive=False,
                        buttons=["copy"],
                        min_width=200,
                        elem_classes="answer",
                        visible=bool(compare),
                    )
                if shown:
                    pictures = gr.Dataset(
                        components=[SafeImage(render=False)],
                        samples=[[str(file)] for file, _ in shown],
                        type="index",
                        label="Held-out pictures of the run",
                    )

        def caption(image, prompt, max_new_tokens, temperature, top_p, seed) -> Iterator[tuple[str, str]]:
            if image is None:
                raise gr.Error("Choose a picture first.", print_exception=False)
            if len(prompt or "") > MAX_PROMPT:
                told = f"The question is longer than {MAX_PROMPT:,} characters."
                raise gr.Error(told, print_exception=False)
            numbers = {"max_new_tokens": int(max_new_tokens), "temperature": temperature, "top_p": top_p}
            yield from speaker.say(image, (prompt or "").strip() or None, numbers | {"seed": int(seed or 0)})

        running = gr.on(
            [go.click, prompt.submit],
            caption,
            [image, prompt, *numbers],
            [base, tuned],
            api_name="caption",
            api_description="Caption a picture, or answer a question about it. The parameters are those of "
            "`vlm-lora caption`; an empty prompt asks for a caption. Gives what the base model says and what "
            "the tuned model says (empty without an adapter), as they grow.",
            trigger_mode="once",
            show_progress="minimal",
        )
        stop.click(None, cancels=[running])
        # Answers never stand beside another picture than the one they are about.
        image.input(
            lambda: ("", "", gr.Textbox("", visible=False)),
            outputs=[base, tuned, reference],
            cancels=[running],
            **QUIETLY,
        )
        if shown:

            def pick(index: int):
                file, example = shown[index]
                references = "\n".join(dict.fromkeys(example.references))
                return str(file), example.prompt, gr.Textbox(references, visible=True), "", ""

            pictures.click(pick, pictures, [image, prompt, reference, base, tuned], cancels=[running], **QUIETLY)

        def look():
            """How far the loading is; once a second until it is done."""
            if future.done():
                asked = gr.Textbox(placeholder=_unasked(future))
                return gr.Textbox(visible=False), asked, gr.Timer(active=False)
            seconds = time.monotonic() - started
            told = f"Loading {loading}: {seconds:.0f} s. You can choose a picture already."
            return told, gr.skip(), gr.skip()

        if not future.done():
            timer = gr.Timer(1)
            timer.tick(look, outputs=[status, prompt, timer], **QUIETLY)
    app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    app.files = files  # deleted with the app
    return app


QUIETLY = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""


def _unasked(captioner: Future) -> str:
    return f"Leave empty for: {captioner.result().prompt if captioner.done() else DEFAULT_PROMPT}"


def _plainly(error: Exception) -> gr.Error:
    """What a person at the page is told: errors about the picture say what to do, others stay in the log."""
    if isinstance(error, DataError | ConfigError):
        text = str(error).removesuffix(".") + "."
        return gr.Error(text[0].upper() + text[1:], print_exception=False)
    log.error("The demo could not answer", exc_info=error)
    told = "The model could not answer this. What went wrong is in the demo's log."
    return gr.Error(told, print_exception=False)


# -- the model -----------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """What was said so far, written by the thread that decodes and read by the page."""

    base: str = ""
    tuned: str = ""
    cut: bool = False
    error: Exception | None = None
    changed: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class _Speaker:
    """The captioner, one answer at a time, each decoded from first to last token in a thread of its own.

    Gradio takes each step of a generator in whatever thread is free, no faster than the page does, and may
    leave it half-way. The model is spared all of that: it decodes at its own pace until done or stopped.
    """

    def __init__(self, captioner: "Future[Captioner]", compare: bool):
        self.captioner = captioner
        self.compare = compare
        self.lock = threading.Lock()

    def say(self, image: ImageRef, prompt: str | None, numbers: dict) -> Iterator[tuple[str, str]]:
        """(base, tuned) so far, whenever there is more; the decoding stops when the generator is closed."""
        answer = _Answer()
        threading.Thread(target=self._decode, args=(answer, image, prompt, numbers), daemon=True).start()
        try:
            while not answer.done.is_set():
                answer.changed.wait(0.5)  # and not longer: only at a yield can Gradio close a generator
                answer.changed.clear()
                yield answer.base, answer.tuned
        finally:
            answer.stopped.set()
        if answer.error is not None:
            raise _plainly(answer.error) from None
        if answer.cut:
            gr.Warning(f"Stopped after {MAX_SECONDS} seconds.")
        yield answer.base, answer.tuned

    def _decode(self, answer: _Answer, image: ImageRef, prompt: str | None, numbers: dict) -> None:
        try:
            captioner = self.captioner.result()
            from vlm_lora import Decoding  # here, as it brings torch, which the page does not wait for

            decoding = Decoding(**numbers)
            with self.lock:
                end = time.monotonic() + MAX_SECONDS
                for who in ("tuned", "base") if self.compare else ("base",):
                    if answer.stopped.is_set():
                        return
                    for text in captioner.stream(image, prompt, tuned=who == "tuned", decoding=decoding):
                        setattr(answer, who, text)
                        answer.changed.set()
                        answer.cut = time.monotonic() > end
                        if answer.cut or answer.stopped.is_set():
                            return
        except Exception as error:
            answer.error = error
        finally:
            answer.done.set()
            answer.changed.set()


# -- examples ------------------------------------------------------------------------------------------------


def find_examples(adapter: str | Path | None, most: int = EXAMPLES) -> list[DemoExample]:
    """Held-out pictures of a run, evenly from all that were evaluated; none where run or data are gone."""
    if adapter is None:
        return []
    given = Path(adapter).expanduser()
    run = next((run for run in (given, given.parent) if (run / "predictions.jsonl").is_file()), None)
    if run is None:
        log.info("No examples: %s holds no predictions.jsonl", adapter)
        return []
    try:
        rows: dict[str, dict] = {}  # the first question about each picture
        for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if len(row["images"]) == 1:
                rows.setdefault(row["example"], row)
        config = read_yaml(run / "config.yaml")
        prompt = config.get("prompt") or DEFAULT_PROMPT
        data = read_dataset(config.get("val") or config["data"], format=config.get("format"), prompt=prompt)
    except (OSError, ValueError, KeyError, TypeError, VlmLoraError) as error:
        log.warning("No examples: the data of %s cannot be read again (%s)", run, error)
        return []
    found = [
        DemoExample(example.images[0], rows[example.id]["question"], tuple(rows[example.id]["references"]))
        for example in data.examples
        if example.id in rows
    ]
    if not found:
        log.warning("No examples: the data no longer holds the pictures of %s", run / "predictions.jsonl")
    return found[:: max(1, len(found) // most)][:most]


def _with_files(examples: Sequence[DemoExample], folder: Path) -> list[tuple[Path, DemoExample]]:
    """Each example with a file that a browser shows, if its picture can be read at all.

    The bytes stay what they are where possible, so that features kept from the training are found again.
    """
    shown = []
    for i, example in enumerate(examples):
        try:
            picture, data = load_image(example.image), example.image.read_bytes()
        except DataError as error:
            log.warning("Example left out: %s", error)
            continue
        kind = Image.open(io.BytesIO(data)).format
        if kind not in BROWSER_FORMATS:
            kind, buffer = "PNG", io.BytesIO()
            picture.save(buffer, kind)
            data = buffer.getvalue()
        file = folder / f"example-{i + 1}.{kind.lower()}"
        file.write_bytes(data)
        shown.append((file, example))
    return shown
