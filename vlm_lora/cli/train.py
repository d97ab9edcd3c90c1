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
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_lora.cli.console import Progress, StopSignals, say
from vlm_lora.cli.flags import add_config, config_of
from vlm_lora.config import TrainConfig
from vlm_lora.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
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
        told = _compare_and_describe(result, config, options)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or result.folder}: could not be written ({error.strerror or error}). The adapter is "
            f"whole: {result.folder / 'adapter'}. Make room; then vlm-lora eval compares base and tuned."
        ) from error
    if result.processes.is_main:
        print(told, end="")
        print(f"Adapter: {result.folder / 'adapter'} (its model card: README.md in there)")
        folder = shlex.quote(str(result.folder))
        say("Next:")
        say(f"  vlm-lora caption PATH... --adapter {folder}")
        say(f"  vlm-lora demo --adapter {folder}")
    return 0


def _compare_and_describe(result: "RunResult", config: TrainConfig, options: argparse.Namespace) -> str:
    """Compare base and tuned, write report and model card; what there is to print about it, in the main process."""
    together = result.processes.sharded  # then the main process cannot answer alone
    if not together:
        result.processes.leave()
    command, scores, told = shlex.join(["vlm-lora", *sys.argv[1:]]), None, ""
    if result.held_out and not options.no_eval and (together or result.processes.is_main):
        from vlm_lora.inference.captioner import Captioner
        from vlm_lora.inference.evaluate import evaluate, table
        from vlm_lora.inference.report import summary, write_report

        captioner = Captioner(result.adapter.backbone, result.adapter, result.features, config.prompt)
        progress = Progress()
        evaluation = evaluate(
            captioner,
            result.held_out[: options.eval_images],
            progress=lambda done, total: progress.count("Comparing base and tuned:", done, total),
        )
        if together:
            result.processes.leave()
        if result.processes.is_main:
            evaluation.write(result.folder)
            report = write_report(result.folder, evaluation, title=result.folder.name, command=command)
            scores = evaluation.scores
            told = f"Base against tuned on {scores['examples']:,} held-out images, {scores['answers']:,} questions:\n\n"
            told += "\n".join([table(scores), "", *summary(scores), "", f"Report with pictures: {report}", ""])
    if not result.processes.is_main:
        return told
    from vlm_lora.inference.card import write_card

    learnt, held_out = (
        sum(len(example.dialogues) for example in side) for side in (result.train_examples, result.held_out)
    )
    write_card(
        result.folder / "adapter",
        config,
        name=result.folder.name,
        data=", ".join(name if name.startswith("hf") else Path(name).name for name in config.sources),
        counts=f"{len(result.train_examples):,} images learnt with {learnt:,} answers, "
        f"{len(result.held_out):,} held out, {len(result.bad):,} rows left out",
        fingerprint=result.fingerprint,
        command=command,
        scores=scores,
    )
    listed = f" ({result.folder / 'quarantined.jsonl'})" if result.bad else ""
    say(f"Rows: trained {learnt:,}, held out {held_out:,}, quarantined {len(result.bad):,}{listed}.")
    return told
