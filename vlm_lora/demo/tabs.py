"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pandas as pd

from vlm_lora import ImageRef
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.demo.downloads import BESIDE, FORMATS, unlike, write_captions
from vlm_lora.demo.inputs import MAX_FILES, SafeFiles, SafeImage, decoding, plain
from vlm_lora.demo.runs import Evaluations, Pictures, read_losses
from vlm_lora.demo.speaker import Speaker
from vlm_lora.errors import ConfigError

MAX_PROMPT = 2000
"""Characters."""
EXAMPLES = 8
GALLERY = 60
"""Held-out pictures shown at once."""
COMES_FIRST = "request comes first"
GAINED, WORSE = "Gained most first", "Only where tuned is worse"

QUIETLY = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""


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
                end = gr.Button(visible="hidden", elem_id="picture-end")
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
        progress=gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[tuple[str, str]]:
        if image is None:
            raise plain("Choose a picture first.")
        numbers = decoding(max_new_tokens, temperature, top_p, seed)
        who = ("tuned", "base") if adapter else ("base",)
        async with aclosing(desk.speaker.say(image, _asked(prompt), numbers, adapter, who)) as answer:
            async for texts in answer:
                if texts is None:
                    progress((1, None), unit=COMES_FIRST)  # reads "1 request comes first"
                else:
                    yield texts

    begin = gr.on(
        [go.click, prompt.submit], None, None, [base, tuned], js=_ended("picture", "['', '']", asks=True), **QUIETLY
    )
    running = begin.success(
        caption,
        [image, prompt, *desk.numbers, desk.adapter],
        [base, tuned],
        api_name="caption",
        api_description="Caption a picture, or answer a question about it. The parameters are those of "
        "`vlm-lora caption`; an empty prompt asks for a caption. Gives what the base model says and what "
        "the tuned model says (empty without an adapter), as they grow.",
        trigger_mode="multiple",
        show_progress="minimal",
    )
    end.click(None, cancels=[running])
    stop.click(None, js=_ended("picture"), **QUIETLY)
    # Answers never stand beside another picture, or below another adapter, than the one they are about.
    answers = [base, tuned, reference]
    cleared = _ended("picture", "['', '', {__type__: 'update', value: '', visible: false}]")
    gr.on([image.input, desk.adapter.change], None, None, answers, js=cleared, **QUIETLY)

    def examples_of(adapter: str) -> list:
        rows = desk.evaluations.examples(adapter, EXAMPLES)
        return [row for row in rows if desk.pictures.whole(row.images[0])]

    def pick(adapter: str, event: gr.SelectData):
        row = examples_of(adapter)[event.index]
        told = gr.Textbox(_references(row), visible=True)
        return str(desk.pictures.whole(row.images[0])), row.question, "", "", told

    told = [image, prompt, *answers]
    examples.select(pick, desk.adapter, told, js=_ended("picture"), queue=False, trigger_mode="multiple", **QUIETLY)

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
        end = gr.Button(visible="hidden", elem_id="several-end")
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

    async def caption_all(images, prompt, max_new_tokens, temperature, top_p, seed, adapter):
        if not images:
            raise plain("Choose some pictures first.")
        asked, numbers = _asked(prompt), decoding(max_new_tokens, temperature, top_p, seed)
        yield [], "Waiting for the model."
        rows, wrong = [], []
        for name, image in _by_name(images).items():
            try:
                said = desk.speaker.say(image, asked, numbers, adapter, ("tuned",) if adapter else ("base",))
                async with aclosing(said):
                    async for texts in said:  # a caption that was stopped half-way never gets into the table
                        caption = f"1 {COMES_FIRST}" if texts is None else "".join(texts)
                        yield rows, f"{len(rows)} of {len(images)} captioned. {name}: {caption}"
                rows = [*rows, [name, caption]]
            except gr.Error as error:
                if isinstance(error.__cause__, ConfigError):  # of the adapter or a number, and so of all pictures
                    raise
                wrong.append(str(error.message))
        yield rows, "\n".join([f"{len(rows)} of {len(images)} captioned.", *wrong])

    running = go.click(None, js=_ended("several", asks=True), **QUIETLY).success(
        caption_all,
        [files, prompt, *desk.numbers, desk.adapter],
        [table, told],
        api_visibility="private",
        trigger_mode="multiple",
        show_progress="minimal",
    )
    end.click(None, cancels=[running])
    stop.click(None, js=_ended("several"), **QUIETLY)
    # Captions belong to the pictures they were made of: others may have the same names.
    files.change(lambda: ([], ""), None, [table, told], js=_ended("several"), queue=False, **QUIETLY)

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


def _ended(tab: str, then: str = "given", *, asks: bool = False) -> str:
    """JavaScript of an event that first ends what is running in the tab, and waits until that is over in the page too.

    Gradio drops a click while an answer is open in the page. It cancels in vain what the server has not numbered
    yet, and without waiting: what was on its way would still be shown. So no cancelling before, and nothing new
    until, all is settled. Of several such events the last one goes on, with ``then`` as its values; whether it
    ``asks`` for an answer then must be known, as that is not settled from here on.
    """
    return f"""async (...given) => {{
        const events = window.events ??= {{}}, mine = events.{tab} = (events.{tab} ?? 0) + 1;
        const settled = async () => {{
            do await new Promise(done => setTimeout(done, 20)); while (window.unsettled);
            if (mine !== events.{tab}) throw new Error('a later one goes on');
        }};
        if (window.unsettled) await settled();
        document.getElementById('{tab}-end').click();
        await settled();
        {"window.coming();" * asks}
        return {then};
    }}"""


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
