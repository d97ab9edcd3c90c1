"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from vlm_lora import ImageRef
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.demo.downloads import BESIDE, FORMATS, unlike, write_captions
from vlm_lora.demo.inputs import MAX_FILES, SafeFiles, SafeImage, decoding, plain
from vlm_lora.demo.runs import Evaluations, Pictures, read_losses
from vlm_lora.demo.speaker import Speaker, Turn, turns
from vlm_lora.errors import ConfigError

MAX_PROMPT = 2000
"""Characters."""
EXAMPLES = 8
GALLERY = 60
"""Held-out pictures shown at once."""
GAINED, WORSE = "Gained most first", "Only where tuned is worse"

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""
AT_ONCE: dict[str, Any] = QUIETLY | {"queue": False, "trigger_mode": "multiple"}
IN_ORDER: dict[str, Any] = QUIETLY | {"concurrency_limit": None, "trigger_mode": "multiple"}
"""For events whose values must reach the page after all that was sent to it before: the queue sees to that."""
ANSWER: dict[str, Any] = IN_ORDER | {"show_progress": "minimal"}
"""For requests: they all begin at once, and wait for the model in `Speaker`, where they can be ended."""


@dataclass(frozen=True)
class Desk:
    """What all tabs work with: the models, the runs, and the inputs that they share."""

    speaker: Speaker
    evaluations: Evaluations
    pictures: Pictures
    adapter: gr.Dropdown
    numbers: list[gr.components.Component]


@dataclass(frozen=True)
class Tab:
    """What a tab shows of the chosen adapter: ``show(name)`` gives a value for each of ``outputs``."""

    outputs: list[gr.components.Component]
    show: Callable[[str], list]


def one_picture_tab(desk: Desk) -> Tab:
    """A picture and a question; base and tuned side by side, as they grow."""
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
            reference = _said("What the data says", visible=False)
            with gr.Row():
                base, tuned = _said("Base", lines=4), _said("Tuned", lines=4)
            examples = gr.Gallery(
                label="Held-out pictures of the run",
                elem_id="examples",
                allow_preview=False,
                height="auto",
                object_fit="contain",
                buttons=[],
                interactive=False,
                visible=False,
            )

    async def caption(
        image,
        prompt,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        adapter,
        number: int = 0,  # 0: a program asks
        request: gr.Request = None,
        progress=gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[tuple[str, str]]:
        turn = turn_of(request) if number else None
        if turn and number != turn.number:
            yield gr.skip(), gr.skip()
            return
        if image is None:
            raise plain("Choose a picture first.")
        numbers = decoding(max_new_tokens, temperature, top_p, seed)
        who = ("tuned", "base") if adapter else ("base",)
        async with aclosing(desk.speaker.say(image, _asked(prompt), numbers, adapter, who, turn)) as answer:
            async for texts in answer:
                if isinstance(texts, int):
                    progress((texts, None), unit=_come_first(texts))  # reads "1 request comes first"
                else:
                    yield texts
        if turn and number != turn.number and not turn.stays:
            yield "", ""

    asked = [image, prompt, *desk.numbers, desk.adapter]
    gr.on(
        [],
        caption,
        asked,
        [base, tuned],
        concurrency_limit=None,
        api_name="caption",
        api_description="Caption a picture, or answer a question about it. The parameters are those of "
        "`vlm-lora caption`; an empty prompt asks for a caption. Gives what the base model says and what "
        "the tuned model says (empty without an adapter), as they grow.",
    )
    number, turn_of = gr.Number(0, visible="hidden"), turns()
    number.change(caption, [*asked, number], [base, tuned], **ANSWER)

    async def begin(request: gr.Request):
        return "", "", turn_of(request).next()

    gr.on([go.click, prompt.submit], begin, None, [base, tuned, number], **AT_ONCE)
    stop.click(_end(turn_of, stays=True), **AT_ONCE)
    # Answers never stand beside another picture, or below another adapter, than the one they are about.
    answers = [base, tuned, reference]
    changes = [image.input, desk.adapter.change]
    gr.on(changes, _end(turn_of), **AT_ONCE)
    gr.on(changes, lambda: ["", "", gr.Textbox("", visible=False)], None, answers, **IN_ORDER)

    def examples_of(adapter: str) -> list:
        rows = desk.evaluations.examples(adapter, EXAMPLES)
        return [row for row in rows if desk.pictures.whole(row.images[0])]

    def pick(adapter: str, event: gr.SelectData, request: gr.Request):
        turn_of(request).next()
        row = examples_of(adapter)[event.index]
        return str(desk.pictures.whole(row.images[0])), row.question, "", "", gr.Textbox(_references(row), visible=True)

    examples.select(pick, desk.adapter, [image, prompt, *answers], **IN_ORDER)

    def show(adapter: str) -> list:
        rows = examples_of(adapter)
        shown = [(str(desk.pictures.whole(row.images[0])), f"Example: {_references(row)}") for row in rows]
        answer = gr.Textbox(label="Base" if adapter else "Answer")
        return [
            _placeholder(desk, adapter),
            answer,
            gr.Textbox(visible=bool(adapter)),
            gr.Gallery(shown, visible=bool(shown)),
        ]

    return Tab([prompt, base, tuned, examples], show)


def several_pictures_tab(desk: Desk) -> Tab:
    """Several pictures; their captions in a table, to be corrected and taken away as training data."""
    files = SafeFiles(
        label=f"Pictures, up to {MAX_FILES}", file_count="multiple", file_types=["image"], height=160, elem_id="files"
    )
    prompt = _prompt()
    with gr.Row():
        go = gr.Button("Caption all", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80, scale=0)
    told = _said("How far it is", lines=2)
    table = gr.Dataframe(
        headers=["File", "Caption"],
        label="Captions (double-click or press Enter to correct one)",
        type="array",
        column_count=2,
        column_widths=["30%", "70%"],
        static_columns=[0],
        interactive=True,
        wrap=True,
        elem_id="table",
    )
    with gr.Row():
        kind = gr.Dropdown(list(FORMATS), label="As training data", scale=2)
        make = gr.Button("Make the file", min_width=120)
    file = gr.File(label="Download", interactive=False, visible=False, elem_id="download")

    async def caption_all(
        images, prompt, max_new_tokens, temperature, top_p, seed, adapter, number, request: gr.Request
    ):
        turn = turn_of(request)
        if number != turn.number:
            yield gr.skip(), gr.skip()
            return
        if not images:
            raise plain("Choose some pictures first.")
        asked, numbers = _asked(prompt), decoding(max_new_tokens, temperature, top_p, seed)
        yield [], "Waiting for the model."
        rows, wrong = [], []
        for name, image in _by_name(images).items():
            try:
                caption = ""
                who = ("tuned",) if adapter else ("base",)
                async with aclosing(desk.speaker.say(image, asked, numbers, adapter, who, turn)) as answer:
                    async for texts in answer:
                        waits = isinstance(texts, int)
                        caption = f"{texts} {_come_first(texts)}" if waits else "".join(texts)
                        yield rows, f"{len(rows)} of {len(images)} captioned. {name}: {caption}"
                if number != turn.number:  # a caption that was stopped half-way never gets into the table
                    if not turn.stays:
                        yield [], ""
                    return
                rows = [*rows, [name, caption]]
            except gr.Error as error:
                if isinstance(error.__cause__, ConfigError):  # of the adapter or a number, and so of all pictures
                    raise
                wrong.append(str(error.message))
        yield rows, "\n".join([f"{len(rows)} of {len(images)} captioned.", *wrong])

    number, turn_of = gr.Number(0, visible="hidden"), turns()
    asked = [files, prompt, *desk.numbers, desk.adapter, number]
    number.change(caption_all, asked, [table, told], **ANSWER)

    async def begin(images, request: gr.Request):
        return turn_of(request).next(images)

    go.click(begin, files, number, **AT_ONCE)
    stop.click(_end(turn_of, stays=True), **AT_ONCE)

    def changed(images: list[ImageRef], request: gr.Request):
        """Captions belong to the pictures they were made of: others may have the same names."""
        turn = turn_of(request)
        if images == turn.about:  # a busy page tells of them after they were asked about
            return gr.skip(), gr.skip()
        turn.next()
        return [], ""

    files.change(changed, files, [table, told], **IN_ORDER)

    def download(kind, images, table) -> Iterator[gr.File]:
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
        with tempfile.TemporaryDirectory(dir=desk.pictures.folder) as folder:
            yield gr.File(str(write_captions(kind, captions, Path(folder))), visible=True)  # gradio takes a copy

    make.click(download, [kind, files, table], file, api_visibility="private")
    # A file with other captions than the table's must not be taken for it.
    gr.on([table.change, files.change, kind.change], lambda: gr.File(visible=False), None, file, queue=False, **QUIETLY)

    return Tab([prompt], lambda adapter: [_placeholder(desk, adapter)])


def evaluation_tab(desk: Desk) -> Tab:
    """What the run was worth on held-out pictures, one by one, and its losses."""
    told = _said("Base against tuned on held-out pictures", lines=2)
    order = gr.Radio([GAINED, WORSE], value=GAINED, label="Show", visible=False)
    with gr.Row():
        with gr.Column(min_width=280) as details:
            texts = [_said(label) for label in ("Question", "What the data says", "Base", "Tuned")]
        with gr.Column(min_width=280, scale=2):
            gallery = gr.Gallery(
                label="Choose a picture",
                allow_preview=False,
                height=480,
                object_fit="contain",
                buttons=[],
                interactive=False,
                elem_id="gallery",
            )
    losses = gr.LinePlot(x="step", y="loss", color="data", label="Loss", height=320, buttons=[], visible=False)

    def rows_of(adapter: str, shown: str) -> list[tuple]:
        rows = desk.evaluations.by_gain(adapter, only_worse=shown == WORSE)[:GALLERY]
        return [(row, verdict) for row, verdict in rows if desk.pictures.small(row.images)]

    def tell(row) -> list[str]:
        return [row.question, _references(row), row.base, row.tuned] if row else [""] * 4

    def fill(adapter: str, shown: str) -> list:
        rows = rows_of(adapter, shown)
        shown = [(str(desk.pictures.small(row.images)), f"{verdict}: {row.tuned}") for row, verdict in rows]
        found = gr.Gallery(shown, selected_index=0 if rows else None)
        return [found, gr.Column(visible=bool(rows)), *tell(rows[0][0] if rows else None)]

    filled = [gallery, details, *texts]
    order.input(fill, [desk.adapter, order], filled, queue=False, **QUIETLY)

    def choose(adapter: str, shown: str, event: gr.SelectData) -> list[str]:
        return tell(rows_of(adapter, shown)[event.index][0])

    gallery.select(choose, [desk.adapter, order], texts, queue=False, **QUIETLY)

    def show(adapter: str) -> list:
        points = pd.DataFrame(read_losses(desk.evaluations.runs.get(adapter)), columns=["step", "loss", "data"])
        plot = gr.LinePlot(points, visible=len(points) > 1)
        summary, any_rows = desk.evaluations.summary(adapter, GALLERY), bool(rows_of(adapter, GAINED))
        return [summary, gr.Radio(value=GAINED, visible=any_rows), plot, *fill(adapter, GAINED)]

    return Tab([told, order, losses, *filled], show)


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


def _prompt() -> gr.Textbox:
    return gr.Textbox(
        "",
        label="Question or instruction",
        placeholder=f"Leave empty for: {DEFAULT_PROMPT}",
        max_length=MAX_PROMPT,
        max_lines=6,
    )


def _placeholder(desk: Desk, adapter: str) -> gr.Textbox:
    return gr.Textbox(placeholder=f"Leave empty for: {desk.speaker.prompt(adapter)}")


def _said(label: str, lines: int = 1, visible: bool = True) -> gr.Textbox:
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


def _references(row) -> str:
    return "\n".join(dict.fromkeys(row.references))
