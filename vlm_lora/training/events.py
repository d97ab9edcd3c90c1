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
    """A method for each thing that happens in a run. They do nothing: override those you want. All are called in every
    process of a run. In those with ``done`` and ``total``, ``done`` of ``total`` are finished."""

    def data(self, format: str, train: Sequence[Example], held_out: Sequence[Example], bad: Sequence[BadRow]) -> None:
        """The data was read and split; ``format`` says what it was taken for."""

    def folder(self, folder: Path) -> None:
        """The run folder is there and locked."""

    def parts(self, adapter: Adapter, model: str) -> None:
        """The base model is loaded and the adapter attached."""

    def looks(self, done: int, total: int) -> None:
        """Images are checked, if no earlier run has checked them."""

    def tokens(self, done: int, total: int) -> None:
        """The tokens of examples are counted."""

    def survey(self, survey: Survey, folder: Path | None, seen_once: bool) -> None:
        """The space that the images' features will take in the cache ``folder``; None: they are not kept on disk."""

    def cache(self, done: int, total: int) -> None:
        """The vision tower sees the images of examples, or finds them in the cache."""

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
        """The steps begin, after ``step`` earlier ones; an epoch has ``answers`` answers."""

    def compiling(self) -> None:
        """The layers are being compiled, which takes a minute or two."""

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
        """Step number ``step``, counted from 1, is done, ``seconds`` after this process began its first one. ``loss``
        is in nats per learnt token; ``seconds_left`` is an estimate."""

    def sample(self, *, images: int, of: int, share: float, steps: float) -> None:
        """Each checkpoint scores a sample of ``images`` held-out images out of ``of``, which takes ``share`` of the
        work of the steps between two checkpoints. Scoring all, once at the end, takes that of ``steps`` steps."""

    def held_out(self, *, step: int, loss: float, images: int, of: int) -> None:
        """The held-out loss after ``step``, of ``images`` images out of ``of``. It comes at checkpoints, and of all at
        the end."""

    def watching(self, *, images: int, share: float) -> None:
        """At the start and at each checkpoint, ``images`` held-out images will be captioned, which takes ``share`` of
        the operations of all steps. With 0 images, ``share`` is what a single one would take: too much."""

    def watched(self, *, step: int, captions: Sequence[Mapping[str, str]]) -> None:
        """The captions of the watched images after ``step``; keys: example, image, question, reference, caption."""

    def scoring(self, done: int, total: int) -> None:
        """All held-out examples are scored, at the end."""

    def best(self, *, step: int, loss: float, images: int, of: int, last: int, num_steps: int) -> None:
        """The adapter of ``step``, with the lowest held-out loss, was taken; ``last`` was the last step of
        ``num_steps``."""

    def cost(self, predicted: "Prediction", seconds: float | None, measured: "Measured") -> None:
        """What was predicted, and what was measured; ``seconds`` is the time predicted from steps 2 and 3."""

    def comparison(self, done: int, total: int) -> None:
        """Held-out examples are answered by base and tuned."""

    def warning(self, text: str) -> None:
        """Something a person should know; the run continues."""
