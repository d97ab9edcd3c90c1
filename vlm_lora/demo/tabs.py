"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.demo.inputs import SafeImage, decoding, plain
from vlm_lora.demo.runs import Evaluations, Pictures
from vlm_lora.demo.speaker import Speaker, Turn, turns

if TYPE_CHECKING:
    from vlm_lora.inference.scoring import Answered

MAX_PROMPT = 2000
"""Characters."""
EXAMPLES = 8

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
                prompt = prompt_box()
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
        async with aclosing(self.desk.speaker.say(image, asked_text(prompt), numbers, adapter, who, turn)) as answer:
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
            placeholder(self.desk, adapter),
            gr.Textbox(label="Base" if adapter else "Answer"),
            gr.Textbox(visible=bool(adapter)),
            gr.Gallery(shown, visible=bool(shown)),
        ]


# -- small parts ---------------------------------------------------------------------------------------------


def _end(turn_of: Callable[[gr.Request], Turn], *, stays: bool = False) -> Callable:
    """What an event does that ends the tab's request, whether it runs, waits, or is yet to be sent by a busy page."""

    async def end(request: gr.Request) -> None:
        turn_of(request).next(stays=stays)

    return end


def _come_first(count: int) -> str:
    return "request comes first" if count == 1 else "requests come first"


def empty(big: str, small: str) -> Markup:
    """Where there is nothing to see yet: what to do."""
    return Markup('<div class="empty"><p class="big">{}</p><p>{}</p></div>').format(big, small)


def progress(kind: str, name: str, big: str, share: float, small: str) -> Markup:
    """How far something is, in a line that is read from afar, and one below it; ``kind`` becomes a class."""
    return Markup(
        '<div class="run {}"><p class="name">{}</p><p class="big">{}</p><div class="bar" role="progressbar" '
        'aria-label="{}" aria-valuenow="{:.0f}" aria-valuemin="0" aria-valuemax="100">'
        '<div style="width: {:.1f}%"></div></div><p>{}</p></div>'
    ).format(kind, name, big, name, 100 * share, 100 * share, small)


def prompt_box() -> gr.Textbox:
    hint = f"Leave empty for: {DEFAULT_PROMPT}"
    return gr.Textbox("", label="Question or instruction", placeholder=hint, max_length=MAX_PROMPT, max_lines=6)


def placeholder(desk: Desk, adapter: str) -> gr.Textbox:
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


def asked_text(prompt: str | None) -> str | None:
    if len(prompt or "") > MAX_PROMPT:
        raise plain(f"The question is longer than {MAX_PROMPT:,} characters.")
    return (prompt or "").strip() or None


def _references(row: "Answered") -> str:
    return "\n".join(dict.fromkeys(row.references))
