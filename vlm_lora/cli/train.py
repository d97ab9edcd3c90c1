"""Train an adapter on a folder or file of images with captions, or questions and answers.

The simplest data is a folder with the caption of cat.jpg in cat.txt; other formats are detected. A tenth of the images
is held out. The run trains LoRA on the language layers and the projector, then compares base and tuned model on the
held-out images. Adapter, report and scores are in the run folder.

  vlm-lora train ./photos --output runs/photos
  vlm-lora train ./photos --model tiny --lr 2e-3          a small model without a network, to try things out
  vlm-lora train ./photos ./rare:3                        two sources; the answers of the second three times an epoch
  vlm-lora train --config run.yaml --lr 1e-4              settings from a file; flags win
  vlm-lora train ./corrected --from runs/photos           a new run that starts from an adapter, on other data
  vlm-lora train ./photos --resume                        continue the newest unfinished run of this data
"""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from vlm_lora.cli.flags import add_config, config_of
from vlm_lora.config import DEFAULT_EVAL_IMAGES
from vlm_lora.config import EVERYDAY as EVERYDAY_KNOBS
from vlm_lora.console import StopSignals, say
from vlm_lora.errors import ConfigError

if TYPE_CHECKING:
    from vlm_lora.run import RunResult

EVERYDAY = (*EVERYDAY_KNOBS, "config", "resume", "no_eval")
"""What ``--help`` shows; ``--help-all`` shows every flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --output, or start if there is none; without --output, the newest "
        "unfinished run of the data",
    )
    parser.add_argument(
        "--allow-change",
        default="",
        metavar="KEYS",
        help="with --resume: settings (or data, val, base), separated by commas, that may differ from the checkpoint's",
    )
    parser.add_argument("--no-eval", action="store_true", help="skip the comparison of base and tuned at the end")
    parser.add_argument(
        "--eval-images",
        type=int,
        default=DEFAULT_EVAL_IMAGES,
        metavar="N",
        help=f"held-out images compared at the end (default: {DEFAULT_EVAL_IMAGES})",
    )


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
    allowed = [key.strip().lstrip("-").replace("-", "_") for key in options.allow_change.split(",") if key.strip()]
    if allowed and not options.resume:
        raise ConfigError("--allow-change goes with --resume: it says what may differ from the checkpoint.")

    from vlm_lora.progress import TrainReport  # here, as they bring torch
    from vlm_lora.run import train

    signals = StopSignals()
    try:
        result = train(
            config,
            resume=options.resume,
            allow_change=allowed,
            events=TrainReport(signals),
            stop=signals,
            eval_images=0 if options.no_eval else options.eval_images,
            command=shlex.join(["vlm-lora", *sys.argv[1:]]),
        )
    finally:
        signals.release()
    if result.is_main:
        _tell(result)
    return 0


def _tell(result: "RunResult") -> None:
    from vlm_lora.inference.verdict import counts, summary, tables_as_text, versus

    listed = f" ({result.folder / 'quarantined.jsonl'})" if result.bad else ""
    learnt, held_out = (
        sum(len(example.dialogues) for example in side) for side in (result.train_examples, result.held_out)
    )
    say(f"Rows: trained {learnt:,}, held out {held_out:,}, quarantined {len(result.bad):,}{listed}.")
    if result.evaluation:
        scores = result.evaluation.scores
        told = "; ".join(counts(task, of) for task, of in scores.tasks.items())
        print(f"Base against tuned, held out: {told}.\n")
        print("\n".join([tables_as_text(scores), "", *summary(scores), "", f"Report with pictures: {result.report}"]))
    if result.against_parent:
        told = " ".join(versus(result.against_parent, "this run", "that one"))
        print(f"Against the run that it started from: {told}")
    print(f"Adapter: {result.folder / 'adapter'} (its model card: README.md in there)")
    folder = shlex.quote(str(result.folder))
    say("Next:")
    say(f"  vlm-lora caption PATH... --adapter {folder}")
    say(f"  vlm-lora demo --adapter {folder}")
