"""Train an adapter on a folder or file of images with captions, or questions and answers.

Finds out the format, holds out a tenth of the images, trains LoRA on the language layers and the projector with the
vision tower frozen, then compares base and tuned on the held-out images. All of it goes into a run folder.

  vlm-lora train ./photos
  vlm-lora train ./photos --model tiny --lr 3e-3          a small model without a network, to try things out
  vlm-lora train ./photos ./rare:3                        two sources; the answers of the second three times an epoch
  vlm-lora train --config run.yaml --lr 1e-4              settings from a file, flags go first
  vlm-lora train ./photos --resume                        go on with the newest unfinished run of it
"""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from vlm_lora.cli.console import Progress, StopSignals, say
from vlm_lora.cli.flags import add_config, config_of
from vlm_lora.config import TrainConfig
from vlm_lora.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vlm_lora.inference.finish import Finished
    from vlm_lora.training.run import RunResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --output; by default in the data's newest unfinished run",
    )
    parser.add_argument(
        "--allow-change",
        default="",
        metavar="KEYS",
        help="with --resume: settings (or data, val, base), with commas, that may differ from the checkpoint's",
    )
    parser.add_argument("--no-eval", action="store_true", help="leave out the comparison of base and tuned at the end")
    parser.add_argument(
        "--eval-images", type=int, default=200, metavar="N", help="held-out images compared at the end (default: 200)"
    )


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
    allowed = [key.strip().lstrip("-").replace("-", "_") for key in options.allow_change.split(",") if key.strip()]
    if allowed and not options.resume:
        raise ConfigError("--allow-change goes with --resume: it says what may differ from the checkpoint.")

    from vlm_lora.cli.progress import TrainReport  # here, as they bring torch
    from vlm_lora.training.run import train

    signals = StopSignals()
    try:
        result = train(config, resume=options.resume, allow_change=allowed, events=TrainReport(signals), stop=signals)
    finally:
        signals.release()
    try:
        finished = _finish(result, config, options)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or result.folder}: could not be written ({error.strerror or error}). The adapter is "
            f"whole: {result.folder / 'adapter'}. Make room; then vlm-lora eval compares base and tuned."
        ) from error
    if finished and result.processes.is_main:
        _tell(result, finished)
    return 0


def _finish(result: "RunResult", config: TrainConfig, options: argparse.Namespace) -> "Finished | None":
    """Compare base and tuned, write report and model card; None in a process that is not needed for it."""
    from vlm_lora.inference.card import Trained
    from vlm_lora.inference.finish import finish

    processes = result.processes
    if not processes.sharded:  # then the main process can answer alone
        processes.leave()
        if not processes.is_main:
            return None
    progress = Progress()
    trained = Trained(
        folder=result.folder,
        config=config,
        train_examples=result.train_examples,
        held_out=result.held_out,
        num_bad=len(result.bad),
        fingerprint=result.fingerprint,
        command=shlex.join(["vlm-lora", *sys.argv[1:]]),
    )
    return finish(
        trained,
        result.adapter,
        result.features,
        eval_images=0 if options.no_eval else options.eval_images,
        write=processes.is_main,
        evaluated=processes.leave,
        progress=lambda done, total: progress.count("Comparing base and tuned:", done, total),
    )


def _tell(result: "RunResult", finished: "Finished") -> None:
    from vlm_lora.inference.scores import summary, tables_as_text

    listed = f" ({result.folder / 'quarantined.jsonl'})" if result.bad else ""
    learnt, held_out = (
        sum(len(example.dialogues) for example in side) for side in (result.train_examples, result.held_out)
    )
    say(f"Rows: trained {learnt:,}, held out {held_out:,}, quarantined {len(result.bad):,}{listed}.")
    if finished.evaluation:
        scores = finished.evaluation.scores
        print(f"Base against tuned on {scores.examples:,} held-out images, {scores.answers:,} questions:\n")
        print("\n".join([tables_as_text(scores), "", *summary(scores), "", f"Report with pictures: {finished.report}"]))
    print(f"Adapter: {result.folder / 'adapter'} (its model card: README.md in there)")
    folder = shlex.quote(str(result.folder))
    say("Next:")
    say(f"  vlm-lora caption PATH... --adapter {folder}")
    say(f"  vlm-lora demo --adapter {folder}")
