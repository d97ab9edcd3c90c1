"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT
from vlm_lora.demo.inputs import MAX_NEW_TOKENS, SafeImage, decoding, plain
from vlm_lora.demo.runs import KINDS, Evaluations, Pictures
from vlm_lora.demo.speaker import Speaker, Turn, turns

if TYPE_CHECKING:
    from vlm_lora.inference.scoring import Answered

MAX_PROMPT = 2000
"""Characters."""
EXAMPLES = 8

# Gradio's arguments, as Any: its signatures name each value, which a dictionary cannot.
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""
AT_ONCE: dict[str, Any] = QUIETLY | {"queue": False, "trigger_mode": "multiple"}
IN_ORDER: dict[str, Any] = QUIETLY | {"concurrency_limit": None, "trigger_mode": "multiple"}
"""For events whose values must reach the page after all that was sent to it before: the queue sees to that."""

API_DESCRIPTION = (
    "Caption a picture, or answer a question about it. The parameters are those of `vlm-lora caption`; an empty prompt "
    "asks for a caption. Gives what the base model says and what the tuned model says (empty without an adapter), as "
    "they grow."
)

ALONE = "Nothing to compare yet.", "The base model is alone. Choose an adapter above, or train one."
UNSEEN = "{} was not compared with its base.", "Train it with held-out pictures: --val-split or --val."
GONE = Markup("<p>The pictures are no longer where they were when it was trained.</p>")
KEYS = "<span class='keys'>. Marked words are in none of the references. Turn with the arrow keys.</span>"
PLACE = Markup("<p><b>{:,}</b> of {:,}" + KEYS + "</p>")


@dataclass(frozen=True)
class Desk:
    """What all tabs work with: the models, the runs, and the adapter that is chosen."""

    speaker: Speaker
    evaluations: Evaluations
    pictures: Pictures
    adapter: gr.Dropdown
    at_close: ExitStack
    """What is still to be done when the page is closed for good."""


class OnePicture:
    """A picture and a question; base and tuned side by side, as they grow. ``show(adapter)`` gives a value for each of
    ``outputs``."""

    def __init__(self, desk: Desk):
        self.desk, self.turn_of = desk, turns()
        with gr.Row():
            with gr.Column(min_width=300):
                how: dict[str, Any] = {"sources": ["upload", "clipboard", "webcam"], "buttons": ["fullscreen"]}
                hint = "Drop a picture here, or choose one"
                image = SafeImage(label="Picture", elem_id="picture", placeholder=hint, height=320, **how)
                prompt = prompt_box()
                numbers = advanced()
                with gr.Row():
                    go = gr.Button("Caption or answer", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=80, scale=0)
            with gr.Column(min_width=300):
                reference = _text("What the data says", visible=False)
                with gr.Row():
                    base, tuned = _text("Base", lines=4), _text("Tuned", lines=4)
                still: dict[str, Any] = {"allow_preview": False, "object_fit": "contain", "interactive": False}
                told = {"label": "Held-out pictures of the run", "elem_id": "examples"}
                examples = gr.Gallery(buttons=[], height="auto", visible=False, **told, **still)
        number = gr.Number(0, visible="hidden")
        self.outputs = [prompt, base, tuned, examples]

        asked = [image, prompt, *numbers, desk.adapter]
        api: dict[str, Any] = {"api_name": "caption", "api_description": API_DESCRIPTION, "concurrency_limit": None}
        gr.on([], self.caption, asked, [base, tuned], **api)
        # Requests all begin at once, and wait for the model in `Speaker`, where they can be ended.
        answer: dict[str, Any] = IN_ORDER | {"show_progress": "minimal"}
        number.change(self.caption, [*asked, number], [base, tuned], **answer)
        gr.on([go.click, prompt.submit], self.begin, None, [base, tuned, number], **AT_ONCE)
        stop.click(_end(self.turn_of, stays=True), **AT_ONCE)
        # Answers never stand beside another picture, or below another adapter, than the one they are about.
        answers, changes = [base, tuned, reference], [image.input, desk.adapter.change]
        gr.on(changes, _end(self.turn_of), **AT_ONCE)
        gr.on(changes, lambda: ["", "", gr.Textbox("", visible=False)], None, answers, **IN_ORDER)
        examples.select(self.pick, desk.adapter, [image, prompt, *answers], **IN_ORDER)

    async def begin(self, request: gr.Request):
        return "", "", self.turn_of(request).next()

    async def caption(  # arguments: a field of the page each; a program that asks has no number
        self, image, prompt, max_new_tokens, temperature, top_p, seed, adapter, number: int = 0,
        request: gr.Request | None = None, progress=gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[tuple]:  # fmt: skip
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
                    unit = "request comes first" if texts == 1 else "requests come first"
                    progress((texts, None), unit=unit)  # reads "1 request comes first"
                else:
                    yield texts
        if turn and number != turn.number and not turn.stays:
            yield "", ""

    def examples_of(self, adapter: str) -> "list[tuple[Answered, str]]":
        """Answers about held-out pictures, and the pictures' files."""
        rows = self.desk.evaluations.examples(adapter, EXAMPLES)
        return [(row, str(file)) for row in rows if (file := self.desk.pictures.file(row.images[0]))]

    def pick(self, adapter: str, event: gr.SelectData, request: gr.Request):
        self.turn_of(request).next()
        row, file = self.examples_of(adapter)[event.index]
        return file, row.question, "", "", gr.Textbox(_references(row), visible=True)

    def show(self, adapter: str) -> list:
        shown = [(file, f"Example: {_references(row)}") for row, file in self.examples_of(adapter)]
        label, tuned = gr.Textbox(label="Base" if adapter else "Answer"), gr.Textbox(visible=bool(adapter))
        prompt = gr.Textbox(placeholder=f"Leave empty for: {self.desk.speaker.captioner(adapter).prompt}")
        return [prompt, label, tuned, gr.Gallery(shown, visible=bool(shown))]


class WhatChanged:
    """What a run gained, answer by answer. ``show(adapter)`` gives a value for each of ``outputs``."""

    def __init__(self, desk: Desk):
        self.desk = desk
        head = gr.HTML(Markup(""), elem_id="changed")
        with gr.Column(visible=False) as answers:
            kind = gr.Radio(list(KINDS), label="Answers", show_label=False, container=False)
            with gr.Row(elem_classes="steps"):
                previous = gr.Button("Previous", min_width=110, scale=0, elem_id="previous")
                following = gr.Button("Next", min_width=110, scale=0, elem_id="next")
                place = gr.HTML(Markup(""))
            card = gr.HTML(Markup(""), elem_id="answer", elem_classes="report")
        tail = gr.HTML(Markup(""), elem_classes="report")
        number = gr.Number(0, visible="hidden", precision=0)
        self.outputs = [head, answers, kind, number, place, card, tail]
        shown: dict[str, Any] = {"outputs": [place, card], "queue": False, "trigger_mode": "always_last"} | QUIETLY
        previous.click(None, number, number, js="number => number - 1", **QUIETLY)
        following.click(None, number, number, js="number => number + 1", **QUIETLY)
        number.change(self.turn, [desk.adapter, kind, number], **shown)
        kind.input(self.turn, [desk.adapter, kind], **shown)
        kind.input(lambda: 0, None, number, queue=False, **QUIETLY)

    def turn(self, adapter: str, kind: str, number: int = 0) -> tuple[Markup, Markup]:
        """An answer of the kind, and which it is; after the last comes the first."""
        from vlm_lora import show_answer  # here, as it brings torch

        evaluation, places = self.desk.evaluations.of(adapter), self.desk.evaluations.places(adapter).get(kind)
        if not evaluation or not places:
            return Markup(""), Markup("")
        at = int(number) % len(places)
        return PLACE.format(at + 1, len(places)), show_answer(evaluation, places[at])

    def show(self, adapter: str) -> list:
        from vlm_lora import show_evaluation, show_learning

        run, evaluation = self.desk.speaker.runs.get(adapter), self.desk.evaluations.of(adapter)
        learning = show_learning(run, self.desk.evaluations.pictures(run)) if run else Markup("")
        kinds = self.desk.evaluations.places(adapter)
        if evaluation is None or not evaluation.scores.tuned:
            big, small = UNSEEN if adapter else ALONE
            head, tail = empty(big.format(adapter), small), Markup("")
        else:
            head, tail = show_evaluation(evaluation)
            head += Markup("") if kinds else GONE
        first = next(iter(kinds), KINDS[0])
        choices = [(f"{kind} {len(places):,}", kind) for kind, places in kinds.items()]
        radio = gr.Radio(choices, value=first) if kinds else gr.skip()
        return [head, gr.Column(visible=bool(kinds)), radio, 0, *self.turn(adapter, first), tail + learning]


# -- small parts ---------------------------------------------------------------------------------------------


def _end(turn_of: Callable[[gr.Request], Turn], *, stays: bool = False) -> Callable:
    """What an event does that ends the tab's request, whether it runs, waits, or is yet to be sent by a busy page."""

    async def end(request: gr.Request) -> None:
        turn_of(request).next(stays=stays)

    return end


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


def advanced() -> list[Any]:
    """What `decoding` takes, folded away below a question."""
    with gr.Accordion("Advanced: length and sampling", open=False):
        numbers: list[Any] = [
            gr.Slider(1, MAX_NEW_TOKENS, DEFAULT_MAX_NEW_TOKENS, step=1, precision=0, label="Most tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest word)"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top p (only with a temperature)"),
            gr.Number(0, label="Seed", precision=0),
        ]
    for number in numbers:  # gradio's own errors do not say which number they mean, and its bounds are the page's
        number.preprocess = lambda payload: payload
    return numbers


def choices(runs: Iterable[str], chosen: str) -> list[tuple[str, str]]:
    """The adapters to choose from; the base alone where the demo was started without one."""
    return [*([] if chosen else [("none: the base alone", "")]), *((name, name) for name in runs)]


def _text(label: str, **how: Any) -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, buttons=["copy"], min_width=200, elem_classes="answer", **how)


def asked_text(prompt: str | None) -> str | None:
    if len(prompt or "") > MAX_PROMPT:
        raise plain(f"The question is longer than {MAX_PROMPT:,} characters.")
    return (prompt or "").strip() or None


def _references(row: "Answered") -> str:
    return "\n".join(dict.fromkeys(row.references))
