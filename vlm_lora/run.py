"""`train` from Python does what `vlm-lora train` does: adapter, comparison with the base, report, model card."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm_lora.config import DEFAULT_EVAL_IMAGES, TrainConfig
from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import CheckpointError, ConfigError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.card import write_card
from vlm_lora.inference.commonest import Commonest
from vlm_lora.inference.evaluate import against, evaluate, questions_about
from vlm_lora.inference.evaluation import Evaluation
from vlm_lora.inference.report import write_report
from vlm_lora.inference.scores import Scores
from vlm_lora.inference.team import ALONE
from vlm_lora.inference.verdict import summary, versus
from vlm_lora.model.adapters.base import Adapter, find_adapter, write_json
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.progress import TrainReport
from vlm_lora.training.events import Events
from vlm_lora.training.held_out import WATCHED_TOKENS
from vlm_lora.training.loop import Captions
from vlm_lora.training.run import TrainedAdapter, train_adapter


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """A finished run: its folder, what it was trained with, and what it gained.

    `evaluation` and `report` are None if nothing is held out. These and `card` are None in all processes but the main
    one.
    """

    folder: Path
    """The run folder. Its ``adapter`` is all you need to keep."""
    steps: int
    """Optimizer steps."""
    adapter: Adapter
    """The trained adapter, on its base model."""
    features: FeatureCache
    """The vision tower's output for the images."""
    train_examples: Sequence[Example]
    held_out: Sequence[Example]
    """The examples that were not trained on."""
    bad: tuple[BadRow, ...]
    """The rows that could not be used."""
    is_main: bool
    """Whether this is the main process, which writes the files."""
    evaluation: Evaluation | None
    """Base and tuned model compared on held-out examples."""
    report: Path | None
    """``report.html``."""
    card: Path | None
    """The model card."""
    against_parent: Scores | None = None
    """With ``from_``: this adapter (as ``tuned``) compared with the one it started from (as ``base``)."""

    def __repr__(self) -> str:
        told = f" {' '.join(summary(self.evaluation.scores))}" if self.evaluation else ""
        return f"<{self.folder}: {self.steps:,} {'step' if self.steps == 1 else 'steps'}.{told}>"

    def _repr_html_(self) -> str:
        """For notebooks: the report with its pictures, in a frame; it runs no script."""
        if not self.report:
            return f"<code>{escape(repr(self))}</code>"
        page = escape(self.report.read_text(encoding="utf-8"), quote=True)
        style = "width: 100%; height: 640px; border: 1px solid #8888"
        return f'<iframe sandbox srcdoc="{page}" style="{style}" title="report"></iframe>'


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    allow_change: Collection[str] = (),
    events: Events | None = None,
    stop: Callable[[], int | None] = lambda: None,
    eval_images: int | None = DEFAULT_EVAL_IMAGES,
    command: str = "vlm_lora.train",
) -> RunResult:
    """Train an adapter into ``config.output`` (by default a new folder in ``runs``), and compare it with its base.

    Args:
        resume: continue from the newest checkpoint in ``config.output``, or of this data's newest run in ``runs``.
        allow_change: with ``resume``: settings, or "data", "val", "base", that may differ from the checkpoint's.
        events: hears what happens. By default it is printed, with progress; ``Events()`` is silent.
        stop: called after each step. If it returns the number of a signal, the run saves and raises `Stopped`.
        eval_images: the most held-out images to compare; 0 leaves out comparison and report, None compares all.
        command: what started the run, for report and card.

    Raises:
        VlmLoraError: data, model, folder or numbers are not right, and the message says what to do. It is a
            `ConfigError`, `DataError`, `ModelError`, `CheckpointError` or `TrainingError`; `Stopped` if ``stop`` asked.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"train takes a TrainConfig, such as train(TrainConfig(data='photos')); found {config!r}.")
    events = events or TrainReport()
    trained = train_adapter(
        config, resume=resume, allow_change=allow_change, events=events, stop=stop, watch=_captions(config)
    )
    is_main, report, card = trained.processes.is_main, None, None
    try:
        read = Encoder(trained.adapter.backbone).read
        commonest = Commonest.of(trained.train_examples, config.prompt, "training", read)
        if is_main:
            commonest.write(trained.folder)
        evaluation, against_parent = _compare(trained, config, events, eval_images, commonest)
        if evaluation and is_main:
            evaluation.write(trained.folder)
            if against_parent:
                write_json(against_parent.to_json(), trained.folder / "against_parent.json")
            name, contract = trained.folder.absolute().name, trained.adapter.contract
            other = (name, f"its parent {contract.parent}", against_parent) if against_parent and contract else None
            report = write_report(
                trained.folder, evaluation, title=name, command=command, other=other, watched=trained.held_out
            )
        if is_main:
            learnt = trained.train_examples.num_answers.sum()
            card = write_card(
                trained.folder / "adapter",
                config,
                counts=f"{len(trained.train_examples):,} images learnt with {learnt:,} answers, "
                f"{len(trained.held_out):,} held out, {len(trained.bad):,} rows left out",
                fingerprint=trained.fingerprint,
                command=command,
                scores=evaluation.scores if evaluation else None,
                against_parent=" ".join(versus(against_parent, "this one", "it")) if against_parent else "",
                template_options=trained.adapter.backbone.family.template_options,
            )
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or trained.folder}: could not be written ({error.strerror or error}). The adapter is "
            f"whole: {trained.folder / 'adapter'}. Make room; then vlm-lora eval compares base and tuned."
        ) from error
    return RunResult(
        folder=trained.folder,
        steps=trained.steps,
        adapter=trained.adapter,
        features=trained.features,
        train_examples=trained.train_examples,
        held_out=trained.held_out,
        bad=trained.bad,
        is_main=is_main,
        evaluation=evaluation if is_main else None,
        report=report,
        card=card,
        against_parent=against_parent if is_main else None,
    )


def _captioner(adapter: Adapter, features: FeatureCache, config: TrainConfig) -> Captioner:
    contract = adapter.contract
    assert contract is not None, "an adapter that was trained here has one"
    return Captioner(adapter.backbone, adapter, features, config.prompt, contract.system)


def _captions(config: TrainConfig) -> Callable[[Adapter, FeatureCache], Captions]:
    """What a run that is being watched says: the greedy answer to the first question about each example."""

    def watch(adapter: Adapter, features: FeatureCache) -> Captions:
        captioner, decoding = _captioner(adapter, features, config), Decoding(max_new_tokens=WATCHED_TOKENS)
        captioner.while_training = True

        def captions(examples: Sequence[Example]) -> list[Mapping[str, str]]:
            asked = [questions_about(example, config.prompt, captioner)[0] for example in examples]
            entries = [features.get(example.images) for example in examples]
            requests = [[question.asked] for question in asked]
            said = captioner.generate(list(zip(entries, requests, strict=True)), decoding=decoding)
            return [
                {
                    "example": example.id,
                    "image": example.images[0].name,
                    "question": question.text,
                    "reference": question.references[0],
                    "caption": text,
                }
                for example, question, (text,) in zip(examples, asked, said, strict=True)
            ]

        return captions

    return watch


def _compare(
    trained: TrainedAdapter, config: TrainConfig, events: Events, eval_images: int | None, commonest: Commonest
) -> tuple[Evaluation | None, Scores | None]:
    """Base against tuned on held-out images, and tuned against the adapter that it started from, if any; by all
    processes together, which part here."""
    processes, held_out = trained.processes, trained.held_out[:eval_images]
    evaluation, against_parent = None, None
    processes.end_steps()
    # Where the base is in pieces, each pass is made by all, and each hears all answers.
    team = ALONE if processes.sharded else processes
    if held_out:
        captioner = _captioner(trained.adapter, trained.features, config)
        evaluation = evaluate(
            captioner, held_out, prompt=config.prompt, commonest=commonest, progress=events.comparison, team=team
        )
        if config.from_:
            with trained.adapter.as_in(find_adapter(config.from_)):
                against_parent = against(evaluation, captioner, held_out, progress=events.comparison, team=team)
    processes.leave()
    return evaluation, against_parent
