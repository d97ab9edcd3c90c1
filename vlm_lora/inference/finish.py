"""What a run ends with: base against tuned on the held-out images, the report of that, and the adapter's model card."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.card import Trained, write_card
from vlm_lora.inference.evaluate import Evaluation, Progress, evaluate
from vlm_lora.inference.report import write_report
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.features import FeatureCache


@dataclass(frozen=True, slots=True)
class Finished:
    """What `finish` found and wrote; each None where there is none."""

    evaluation: Evaluation | None
    report: Path | None
    card: Path | None


def finish(
    run: Trained,
    adapter: Adapter,
    features: FeatureCache,
    *,
    eval_images: int | None = None,
    write: bool = True,
    evaluated: Callable[[], None] = lambda: None,
    progress: Progress = lambda done, total: None,
) -> Finished:
    """Compare base and tuned on held-out images, and write scores, report and model card into the run folder.

    Args:
        eval_images: how many images are compared at most; 0 leaves out comparison and report, None compares all.
        write: False where another process of the run writes, and this one only takes its part in the comparison.
        evaluated: called before anything is written: the other processes of the run are needed no longer.
        progress: of the comparison, as `evaluate` calls it.

    Raises:
        OSError: something cannot be written; the adapter is whole.
    """
    evaluation = report = None
    if held_out := run.held_out[:eval_images]:
        captioner = Captioner(adapter.backbone, adapter, features, run.config.prompt)
        evaluation = evaluate(captioner, held_out, progress=progress)
    evaluated()
    if not write:
        return Finished(evaluation, None, None)
    if evaluation:
        evaluation.write(run.folder)
        report = write_report(run.folder, evaluation, title=run.folder.name, command=run.command)
    return Finished(evaluation, report, write_card(run, evaluation and evaluation.scores))
