"""The tab on what a run changed: its figures from afar, each answer beside its picture, and what is still wrong."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora.demo.runs import KINDS
from vlm_lora.demo.tabs import QUIETLY, Desk, empty

ALONE = "Nothing to compare yet.", "The base model is alone. Choose an adapter above, or train one."
UNSEEN = "{} was not compared with its base.", "Train it with held-out pictures: --val-split or --val."
GONE = Markup("<p>The pictures are no longer where they were when it was trained.</p>")
KEYS = "<span class='keys'>. Marked words are in none of the references. Turn with the arrow keys.</span>"
PLACE = Markup("<p><b>{:,}</b> of {:,}" + KEYS + "</p>")


class WhatChanged:
    """``show(adapter)`` gives, as every tab's does, a value for each of ``outputs``."""

    def __init__(self, desk: Desk):
        self.desk = desk
        head = gr.HTML(Markup(""), elem_id="changed")
        with gr.Column(visible=False) as answers:
            kind = gr.Radio(list(KINDS), label="Answers", show_label=False, container=False)
            with gr.Row(elem_classes="steps"):
                previous = gr.Button("Previous", min_width=110, scale=0, elem_id="previous")
                following = gr.Button("Next", min_width=110, scale=0, elem_id="next")
                place = gr.HTML(Markup(""))
            card = gr.HTML(Markup(""), elem_id="answer")
        tail = gr.HTML(Markup(""))
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

        run, evaluation = self.desk.runs.get(adapter), self.desk.evaluations.of(adapter)
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
