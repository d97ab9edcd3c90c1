"""The tabs. What a person types, what data holds and what a model says is shown as plain text alone."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora import show_answer, show_evaluation, show_learning
from vlm_lora.demo.inputs import advanced, asked_text, decoding, from_their_machine, one_picture, prompt_box
from vlm_lora.demo.runs import KINDS, Evaluations, Pictures
from vlm_lora.demo.speaker import MAX_PAGES, Speaker, Turn
from vlm_lora.errors import ConfigError

EXAMPLES = 8

# Gradio's arguments, as Any: its signatures name each value, which a dictionary cannot.
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only tidy up the page."""
AT_ONCE: dict[str, Any] = QUIETLY | {"queue": False, "trigger_mode": "multiple"}
"""For events that never fail, as gradio (6.31) then tells nobody."""
IN_ORDER: dict[str, Any] = QUIETLY | {"concurrency_limit": None, "trigger_mode": "multiple"}
"""For events whose values must reach the page after all that was sent before, and their errors too."""

ALONE = "Nothing to compare yet.", "The base model is alone. Choose an adapter above, or train one."
UNSEEN = "{} was not compared with its base.", "Train it with held-out pictures: --val-split or --val."
GONE = Markup("<p>The pictures are no longer where they were when it was trained.</p>")
KEYS = "<span class='keys'>. Marked words are in none of the references. Turn with the arrow keys.</span>"
PLACE = Markup("<p><b>{:,}</b> of {:,}" + KEYS + "</p>")


@dataclass(frozen=True)
class Desk:
    """What all tabs work with: the models, the runs, the adapter that is chosen, and what is done at the very end."""

    speaker: Speaker
    evaluations: Evaluations
    pictures: Pictures
    adapter: gr.Dropdown
    at_close: ExitStack


class OnePicture:
    """A picture and a question; base and tuned side by side, as they grow. ``show(adapter)`` gives a value for each of
    ``outputs``."""

    def __init__(self, desk: Desk):
        self.desk, self.turns = desk, lru_cache(MAX_PAGES)(lambda page: Turn())
        with gr.Row():
            with gr.Column(min_width=300):
                how: dict[str, Any] = {"sources": ["upload", "clipboard", "webcam"], "buttons": ["fullscreen"]}
                hint = "Drop a picture here, or choose one"
                image = gr.Image(label="Picture", elem_id="picture", placeholder=hint, height=320, **how)
                from_their_machine(image, one_picture)
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
        gr.on([], self.caption, asked, [base, tuned], api_name="caption", concurrency_limit=None)
        # Requests all begin at once, and wait for the model in `Speaker`, where they can be ended.
        answer: dict[str, Any] = IN_ORDER | {"show_progress": "minimal"}
        number.change(self.caption, [*asked, number], [base, tuned], **answer)
        gr.on([go.click, prompt.submit], self.begin, None, [base, tuned, number], **AT_ONCE)
        stop.click(self.stop, **AT_ONCE)
        # Answers never stand beside another picture, or below another adapter, than the one they are about.
        answers, changes = [base, tuned, reference], [image.input, desk.adapter.change]
        gr.on(changes, self.end, **AT_ONCE)
        gr.on(changes, lambda: ["", "", gr.Textbox("", visible=False)], None, answers, **IN_ORDER)
        examples.select(self.pick, desk.adapter, [image, prompt, *answers], **IN_ORDER)

    async def begin(self, request: gr.Request):
        return "", "", self.turns(request.session_hash).next()

    async def stop(self, request: gr.Request) -> None:
        self.turns(request.session_hash).next(stays=True)

    async def end(self, request: gr.Request) -> None:
        """End what was asked, whether it runs, waits, or is yet to be sent by a busy page."""
        self.turns(request.session_hash).next()

    async def caption(  # arguments: a field of the page each; a program that asks has no number
        self, image, prompt, max_new_tokens, temperature, top_p, seed, adapter, number: int = 0,
        request: gr.Request | None = None, progress=gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Caption a picture, or answer a question about it. The parameters are those of `vlm-lora caption`; an empty
        prompt asks for a caption. Gives what the base model says and what the tuned model says (empty without an
        adapter), as they grow."""
        turn = self.turns(request.session_hash) if number and request else None
        if turn and number != turn.number:
            yield gr.skip(), gr.skip()
            return
        if image is None:
            raise ConfigError("Choose a picture first.")
        numbers = decoding(max_new_tokens, temperature, top_p, seed)
        async with aclosing(self.desk.speaker.say(image, asked_text(prompt), numbers, adapter, turn)) as answer:
            async for texts in answer:
                if isinstance(texts, int):
                    unit = "request comes first" if texts == 1 else "requests come first"
                    progress((texts, None), unit=unit)  # reads "1 request comes first"
                else:
                    yield texts
        if turn and number != turn.number and not turn.stays:
            yield "", ""

    def examples_of(self, adapter: str) -> list[tuple[str, str, str]]:
        """Files of held-out pictures, what was asked about each, and what the data says."""
        rows = [
            (self.desk.pictures.file(row.images[0]), row) for row in self.desk.evaluations.examples(adapter, EXAMPLES)
        ]
        return [(str(file), row.question, "\n".join(dict.fromkeys(row.references))) for file, row in rows if file]

    def pick(self, adapter: str, event: gr.SelectData, request: gr.Request):
        self.turns(request.session_hash).next()
        file, question, told = self.examples_of(adapter)[event.index]
        return file, question, "", "", gr.Textbox(told, visible=True)

    def show(self, adapter: str) -> list:
        shown = [(file, f"Example: {told}") for file, _, told in self.examples_of(adapter)]
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
        shown: dict[str, Any] = {"queue": False, "trigger_mode": "always_last"} | QUIETLY
        previous.click(None, number, number, js="number => number - 1", **QUIETLY)
        following.click(None, number, number, js="number => number + 1", **QUIETLY)
        number.change(self.turn, [desk.adapter, kind, number], [place, card], **shown)
        kind.input(lambda *asked: [0, *self.turn(*asked)], [desk.adapter, kind], [number, place, card], **shown)

    def turn(self, adapter: str, kind: str, number: int = 0) -> tuple[Markup, Markup]:
        """An answer of the kind, and which it is; after the last comes the first."""
        evaluation, places = self.desk.evaluations.of(adapter), self.desk.evaluations.places(adapter).get(kind)
        if not evaluation or not places:
            return Markup(""), Markup("")
        at = int(number) % len(places)
        return PLACE.format(at + 1, len(places)), show_answer(evaluation, places[at])

    def show(self, adapter: str) -> list:
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


def empty(big: str, small: str) -> Markup:
    """Where there is nothing to see yet: what to do."""
    return Markup('<div class="empty"><p class="big">{}</p><p>{}</p></div>').format(big, small)


def progress(kind: str, name: str, big: str, share: float, small: str) -> Markup:
    """How far something is, in a line that is read from afar, and one below it; ``kind`` becomes a class."""
    return Markup(
        '<div class="run {}"><p class="name">{}</p><p class="big">{}</p><progress aria-label="{}" value="{:.3f}">'
        "</progress><p>{}</p></div>"
    ).format(kind, name, big, name, share, small)


def _text(label: str, **how: Any) -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, buttons=["copy"], min_width=200, elem_classes="answer", **how)
