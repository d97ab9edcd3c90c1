"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlm_lora import ImageRef
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.demo.downloads import BESIDE, FORMATS, unlike, write_captions
from vlm_lora.demo.inputs import MAX_FILES, SafeFiles, SafeImage, decoding, plain
from vlm_lora.demo.runs import Evaluations, Pictures
from vlm_lora.demo.speaker import Speaker, Turn, turns
from vlm_lora.errors import ConfigError

if TYPE_CHECKING:
    from vlm_lora.inference.evaluate import Answered

MAX_PROMPT = 2000
"""Characters."""
EXAMPLES = 8
GALLERY = 60
"""Captions that are looked at a second time, shown at once."""

# Gradio's arguments, as Any: its signatures name each value, which a dictionary cannot.
STILL: dict[str, Any] = {"allow_preview": False, "object_fit": "contain", "buttons": [], "interactive": False}
"""For galleries in which a picture is chosen."""
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""
AT_ONCE: dict[str, Any] = QUIETLY | {"queue": False, "trigger_mode": "multiple"}
IN_ORDER: dict[str, Any] = QUIETLY | {"concurrency_limit": None, "trigger_mode": "multiple"}
"""For events whose values must reach the page after all that was sent to it before: the queue sees to that."""
ANSWER: dict[str, Any] = IN_ORDER | {"show_progress": "minimal"}
"""For requests: they all begin at once, and wait for the model in `Speaker`, where they can be ended."""

API_DESCRIPTION = (
    "Caption a picture, or answer a question about it. The parameters are those of `vlm-lora caption`; an empty prompt "
    "asks for a caption. Gives what the base model says and what the tuned model says (empty without an adapter), as "
    "they grow."
)


@dataclass(frozen=True)
class Desk:
    """What all tabs work with: the models, the runs, and the inputs that they share."""

    runs: dict[str, Path]
    """Those that can be chosen, by name: what is trained here comes to them."""
    speaker: Speaker
    evaluations: Evaluations
    pictures: Pictures
    adapter: gr.Dropdown
    numbers: Sequence[gr.Slider | gr.Number]


class OnePicture:
    """A picture and a question; base and tuned side by side, as they grow.

    ``show(adapter)`` gives, as every tab's does, a value for each of ``outputs``.
    """

    def __init__(self, desk: Desk):
        self.desk, self.turn_of = desk, turns()
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
                prompt = _prompt()
                with gr.Row():
                    go = gr.Button("Caption or answer", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=80, scale=0)
            with gr.Column(min_width=300):
                reference = _text("What the data says", visible=False)
                with gr.Row():
                    base, tuned = _text("Base", lines=4), _text("Tuned", lines=4)
                label = "Held-out pictures of the run"
                examples = gr.Gallery(label=label, elem_id="examples", height="auto", visible=False, **STILL)
        number = gr.Number(0, visible="hidden")
        self.outputs = [prompt, base, tuned, examples]

        asked = [image, prompt, *desk.numbers, desk.adapter]
        api: dict[str, Any] = {"api_name": "caption", "api_description": API_DESCRIPTION, "concurrency_limit": None}
        gr.on([], self.caption, asked, [base, tuned], **api)
        number.change(self.caption, [*asked, number], [base, tuned], **ANSWER)
        gr.on([go.click, prompt.submit], self.begin, None, [base, tuned, number], **AT_ONCE)
        stop.click(_end(self.turn_of, stays=True), **AT_ONCE)
        # Answers never stand beside another picture, or below another adapter, than the one they are about.
        answers = [base, tuned, reference]
        changes = [image.input, desk.adapter.change]
        gr.on(changes, _end(self.turn_of), **AT_ONCE)
        gr.on(changes, lambda: ["", "", gr.Textbox("", visible=False)], None, answers, **IN_ORDER)
        examples.select(self.pick, desk.adapter, [image, prompt, *answers], **IN_ORDER)

    async def begin(self, request: gr.Request):
        return "", "", self.turn_of(request).next()

    async def caption(  # arguments: a field of the page each
        self,
        image,
        prompt,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        adapter,
        number: int = 0,  # a program that asks has none
        request: gr.Request | None = None,
        progress=gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[tuple]:
        """Of so many arguments as the page has fields."""
        turn = self.turn_of(request) if number and request else None
        if turn and number != turn.number:
            yield gr.skip(), gr.skip()
            return
        if image is None:
            raise plain("Choose a picture first.")
        numbers = decoding(max_new_tokens, temperature, top_p, seed)
        who = ("tuned", "base") if adapter else ("base",)
        async with aclosing(self.desk.speaker.say(image, _asked(prompt), numbers, adapter, who, turn)) as answer:
            async for texts in answer:
                if isinstance(texts, int):
                    progress((texts, None), unit=_come_first(texts))  # reads "1 request comes first"
                else:
                    yield texts
        if turn and number != turn.number and not turn.stays:
            yield "", ""

    def examples_of(self, adapter: str) -> "list[tuple[Answered, str]]":
        """Answers about held-out pictures, and the pictures' files."""
        rows = self.desk.evaluations.examples(adapter, EXAMPLES)
        files = [(row, self.desk.pictures.file(row.images[0])) for row in rows]
        return [(row, str(file)) for row, file in files if file]

    def pick(self, adapter: str, event: gr.SelectData, request: gr.Request):
        self.turn_of(request).next()
        row, file = self.examples_of(adapter)[event.index]
        return file, row.question, "", "", gr.Textbox(_references(row), visible=True)

    def show(self, adapter: str) -> list:
        shown = [(file, f"Example: {_references(row)}") for row, file in self.examples_of(adapter)]
        return [
            _placeholder(self.desk, adapter),
            gr.Textbox(label="Base" if adapter else "Answer"),
            gr.Textbox(visible=bool(adapter)),
            gr.Gallery(shown, visible=bool(shown)),
        ]


class SeveralPictures:
    """Several pictures; their captions in a table, to be corrected and taken away as training data."""

    def __init__(self, desk: Desk):
        self.desk, self.turn_of = desk, turns()
        label = f"Pictures, up to {MAX_FILES}"
        files = SafeFiles(label=label, file_count="multiple", file_types=["image"], height=160, elem_id="files")
        prompt = _prompt()
        with gr.Row():
            go = gr.Button("Caption all", variant="primary", min_width=120)
            stop = gr.Button("Stop", min_width=80, scale=0)
        state = _text("How far it is", lines=2)
        table = captions_table("File", elem_id="table")
        with gr.Row():
            kind = gr.Dropdown(list(FORMATS), label="As training data", scale=2)
            make = gr.Button("Make the file", min_width=120)
        file = gr.File(label="Download", interactive=False, visible=False, elem_id="download")
        number = gr.Number(0, visible="hidden")
        self.outputs = [prompt]

        asked = [files, prompt, *desk.numbers, desk.adapter, number]
        number.change(self.caption_all, asked, [table, state], **ANSWER)
        go.click(self.begin, files, number, **AT_ONCE)
        stop.click(_end(self.turn_of, stays=True), **AT_ONCE)
        files.change(self.changed, files, [table, state], **IN_ORDER)
        make.click(self.download, [kind, files, table], file, api_visibility="private")
        # A file with other captions than the table's must not be taken for it.
        stale = [table.change, files.change, kind.change]
        gr.on(stale, lambda: gr.File(visible=False), None, file, queue=False, **QUIETLY)

    async def begin(self, images, request: gr.Request):
        return self.turn_of(request).next(images)

    def changed(self, images: list[ImageRef], request: gr.Request):
        """Captions belong to the pictures they were made of: others may have the same names."""
        turn = self.turn_of(request)
        if images == turn.about:  # a busy page tells of them after they were asked about
            return gr.skip(), gr.skip()
        turn.next()
        return [], ""

    async def caption_all(  # arguments: a field of the page each
        self, images, prompt, max_new_tokens, temperature, top_p, seed, adapter, number, request: gr.Request
    ) -> AsyncIterator[tuple]:
        """Of so many arguments as the page has fields."""
        turn = self.turn_of(request)
        if number != turn.number:
            yield gr.skip(), gr.skip()
            return
        if not images:
            raise plain("Choose some pictures first.")
        asked, numbers = _asked(prompt), decoding(max_new_tokens, temperature, top_p, seed)
        who = ("tuned",) if adapter else ("base",)
        yield [], "Waiting for the model."
        rows, errors = [], []
        for name, image in _by_name(images).items():
            caption = ""
            try:
                async with aclosing(self.desk.speaker.say(image, asked, numbers, adapter, who, turn)) as answer:
                    async for texts in answer:
                        caption = f"{texts} {_come_first(texts)}" if isinstance(texts, int) else "".join(texts)
                        yield rows, f"{len(rows)} of {len(images)} captioned. {name}: {caption}"
            except gr.Error as error:
                if isinstance(error.__cause__, ConfigError):  # of the adapter or a number, and so of all pictures
                    raise
                errors.append(str(error.message))
                continue
            if number != turn.number:  # a caption that was stopped half-way never gets into the table
                if not turn.stays:
                    yield [], ""
                return
            rows = [*rows, [name, caption]]
        yield rows, "\n".join([f"{len(rows)} of {len(images)} captioned.", *errors])

    def download(self, kind: str, images: list[ImageRef], table: list[list]) -> Iterator[gr.File]:
        by_name = _by_name(images)
        rows = [(str(name or ""), str(text or "").strip()) for name, text in table]
        rows = [(name, text) for name, text in rows if text]
        if not rows:
            raise plain("There are no captions yet.")
        strange = [name or text for name, text in rows if name not in by_name]
        if strange:
            raise plain(f"The row of {strange[0]!r} belongs to no picture above. Put its file name back, or remove it")
        alike = [image.name for name, image in by_name.items() if name != image.name]
        if alike and kind in BESIDE:  # under its number a row would be taken for another picture, or for none
            raise plain(f"Several pictures are called {alike[0]!r}, which a table cannot tell apart. Take the zip")
        captions = [(name, text, by_name[name]) for name, text in rows]
        with tempfile.TemporaryDirectory(dir=self.desk.pictures.folder) as folder:
            yield gr.File(str(write_captions(kind, captions, Path(folder))), visible=True)  # gradio takes a copy

    def show(self, adapter: str) -> list:
        return [_placeholder(self.desk, adapter)]


class ReviewOfRun:
    """The captions that the run was trained on, those first that their pictures speak against."""

    def __init__(self, desk: Desk):
        self.desk = desk
        summary = _text("Captions of the data", lines=2)
        with gr.Row():
            with gr.Column(min_width=280) as details:
                texts = [_text(label) for label in ("Caption", "Where it stands", "What the picture says for it")]
            with gr.Column(min_width=280, scale=2):
                gallery = gr.Gallery(label="The most doubtful first", height=480, elem_id="review", **STILL)
        self.outputs = [summary, gallery, details, *texts]
        gallery.select(self.choose, desk.adapter, texts, queue=False, **QUIETLY)

    def rows_of(self, adapter: str) -> list[tuple[dict, str]]:
        """Reviewed captions, and the pictures' files."""
        rows = self.desk.evaluations.reviewed(adapter, GALLERY)
        files = [(row, self.desk.pictures.file(image, small=True)) for row, image in rows]
        return [(row, str(file)) for row, file in files if file]

    def choose(self, adapter: str, event: gr.SelectData) -> list[str]:
        return _texts_of_review(self.rows_of(adapter)[event.index][0])

    def show(self, adapter: str) -> list:
        rows = self.rows_of(adapter)
        shown = [(file, f"{row['score']:+.2f}: {row['caption']}") for row, file in rows]
        texts = _texts_of_review(rows[0][0]) if rows else [""] * 3
        gallery = gr.Gallery(shown, selected_index=0 if rows else None)
        return [self.desk.evaluations.review_summary(adapter, GALLERY), gallery, gr.Column(visible=bool(rows)), *texts]


# -- small parts ---------------------------------------------------------------------------------------------


def _end(turn_of: Callable[[gr.Request], Turn], *, stays: bool = False) -> Callable:
    """What an event does that ends the tab's request, whether it runs, waits, or is yet to be sent by a busy page."""

    async def end(request: gr.Request) -> None:
        turn_of(request).next(stays=stays)

    return end


def _come_first(count: int) -> str:
    return "request comes first" if count == 1 else "requests come first"


def _by_name(images: list[ImageRef]) -> dict[str, ImageRef]:
    return dict(zip(unlike([image.name for image in images]), images, strict=True))


def captions_table(first: str, **settings: Any) -> gr.Dataframe:
    """A caption in each row, which can be corrected; ``first`` is the heading of what it is of."""
    return gr.Dataframe(
        headers=[first, "Caption"],
        label="Captions (double-click or press Enter to correct one)",
        type="array",
        column_count=2,
        column_widths=["30%", "70%"],
        static_columns=[0],
        interactive=True,
        wrap=True,
        **settings,
    )


def _prompt() -> gr.Textbox:
    hint = f"Leave empty for: {DEFAULT_PROMPT}"
    return gr.Textbox("", label="Question or instruction", placeholder=hint, max_length=MAX_PROMPT, max_lines=6)


def _placeholder(desk: Desk, adapter: str) -> gr.Textbox:
    return gr.Textbox(placeholder=f"Leave empty for: {desk.speaker.prompt(adapter)}")


def _text(label: str, lines: int = 1, visible: bool = True) -> gr.Textbox:
    return gr.Textbox(
        label=label,
        lines=lines,
        interactive=False,
        buttons=["copy"],
        min_width=200,
        elem_classes="answer",
        visible=visible,
    )


def _asked(prompt: str | None) -> str | None:
    if len(prompt or "") > MAX_PROMPT:
        raise plain(f"The question is longer than {MAX_PROMPT:,} characters.")
    return (prompt or "").strip() or None


def _texts_of_review(row: dict) -> list[str]:
    likely, blind = row["log_probability"], row["without_picture"]
    told = f"{row['score']:+.2f} a token: log-probability {likely:.2f} with the picture, {blind:.2f} without"
    return [str(row["caption"]), str(row["place"]), told]


def _references(row: "Answered") -> str:
    return "\n".join(dict.fromkeys(row.references))
