"""What a run tells while it works."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.features import Survey

if TYPE_CHECKING:
    from vlm_lora.training.cost import Measured, Prediction


class Events:
    """A method for each thing that happens, called in every process. They do nothing: override those you want."""

    def data(self, format: str, train: Sequence[Example], held_out: Sequence[Example], bad: Sequence[BadRow]) -> None:
        """The data has been read and split; ``format`` says what it was taken for."""

    def folder(self, folder: Path) -> None:
        """The run folder is there and locked."""

    def parts(self, adapter: Adapter, model: str) -> None:
        """The base model is loaded and the adapter attached."""

    def looks(self, done: int, total: int) -> None:
        """So many images have been looked at, of those that no earlier run has looked at."""

    def tokens(self, done: int, total: int) -> None:
        """So many examples have their tokens counted."""

    def survey(self, survey: Survey, folder: Path | None, seen_once: bool) -> None:
        """What the images will take in the cache ``folder``, if there is one."""

    def cache(self, done: int, total: int) -> None:
        """So many examples have their images seen, or found in the cache."""

    def start(
        self,
        *,
        step: int,
        num_steps: int,
        answers: int,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        processes: int,
        sharded: bool,
        imbalance: float,
    ) -> None:
        """The steps begin, after ``step`` of them; ``answers`` is of an epoch."""

    def compiling(self) -> None:
        """The layers are compiled now, which takes a minute or two."""

    def step(  # arguments: the numbers of a line of metrics.jsonl
        self,
        *,
        step: int,
        num_steps: int,
        loss: float,
        lr: float,
        grad_norm: float,
        answers: int,
        tokens: int,
        answers_per_second: float,
        seconds: float,
        seconds_left: float,
    ) -> None:
        """A step is done, the ``step``-th counted from 1; ``seconds`` since the first one of this process began."""

    def sample(self, *, images: int, of: int, share: float, steps: float) -> None:
        """The held-out loss at a checkpoint will be of so many ``images`` of all, and take this share of the work of
        the steps between two; that of all, once at the end, the work of so many steps."""

    def held_out(self, *, step: int, loss: float, images: int, of: int) -> None:
        """The loss after ``step`` of ``images`` held-out ones, ``of`` so many: at checkpoints, and all at the end."""

    def watching(self, *, images: int, share: float) -> None:
        """So many held-out ``images`` will be captioned at the start and at each checkpoint, which takes this ``share``
        of the operations of all steps. Where it would be too large for a single one there are none, and it is that
        one's."""

    def watched(self, *, step: int, captions: Sequence[Mapping[str, str]]) -> None:
        """What is said after ``step`` of each image that is watched: example, image, question, reference, caption."""

    def scoring(self, done: int, total: int) -> None:
        """So many of all held-out examples are scored, at the end."""

    def best(self, *, step: int, loss: float, images: int, of: int, last: int, num_steps: int) -> None:
        """The adapter of the lowest held-out loss (of ``images``) was taken, though ``last`` was the last step."""

    def cost(self, predicted: "Prediction", seconds: float | None, measured: "Measured") -> None:
        """What was predicted beside what the steps took; ``seconds`` were predicted from steps 2 and 3."""

    def comparison(self, done: int, total: int) -> None:
        """So many held-out examples were answered by base and tuned."""

    def warning(self, text: str) -> None:
        """Something a person should know; the run goes on."""
