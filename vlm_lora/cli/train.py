"""Train an adapter on a folder or file of images with captions, or questions and answers.

Finds out the format, holds out a tenth of the images, trains LoRA on the language layers and the projector with the
vision tower frozen, then compares base and tuned on the held-out images. All of it goes into a run folder.

  vlm-lora train ./photos
  vlm-lora train ./photos --model tiny --lr 3e-3          a small model without a network, to try things out
  vlm-lora train --config run.yaml --lr 1e-4              settings from a file, flags go first
  vlm-lora train ./photos --output runs/a --resume        go on after a stop
"""

import argparse
import shlex
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from vlm_lora.cli.console import Progress, StopSignals, TrainReport, say
from vlm_lora.config import TrainConfig, config_from, knob_type, read_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for knob in fields(TrainConfig):
        if knob.default is MISSING:
            parser.add_argument("data", nargs="?", metavar="DATA", help=knob.metadata["help"])
            continue
        kind = knob_type(knob.name)
        shown = "" if knob.default is None else f" (default: {knob.default})"
        extra: dict = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if kind is not bool:
            extra["metavar"] = {str: "TEXT", int: "N", float: "X"}[kind]
        if choices := knob.metadata.get("choices"):
            extra |= {"choices": choices, "metavar": "|".join(choices)}
        text = (knob.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument("--" + knob.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **extra)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, named as the flags")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--no-eval", action="store_true", help="leave out the comparison of base and tuned at the end")
    parser.add_argument(
        "--eval-images", type=int, default=200, metavar="N", help="held-out images compared at the end (default: 200)"
    )


def run(options: argparse.Namespace) -> int:
    values = read_yaml(options.config) if options.config else {}
    given = vars(options)
    values |= {f.name: given[f.name] for f in fields(TrainConfig) if given.get(f.name) is not None}
    config = config_from(values, str(options.config or "vlm-lora train"))

    from vlm_lora.training.run import train

    signals = StopSignals()
    try:
        result = train(config, resume=options.resume, report=TrainReport(signals), stop=signals)
    finally:
        signals.release()
    folder = shlex.quote(str(result.folder))
    if result.held_out and not options.no_eval:
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
        evaluation.write(result.folder)
        command = shlex.join(["vlm-lora", *sys.argv[1:]])
        report = write_report(result.folder, evaluation, title=result.folder.name, command=command)
        scores = evaluation.scores
        print(f"Base against tuned on {scores['examples']:,} held-out images, {scores['answers']:,} questions:\n")
        print(table(scores))
        print("\n" + "\n".join(summary(scores)))
        print(f"\nReport with pictures: {report}")
    if result.bad:
        say(f"{len(result.bad):,} rows were left out: {result.folder / 'quarantined.jsonl'}")
    print(f"Adapter: {result.folder / 'adapter'}")
    say("Next:")
    say(f"  vlm-lora caption PATH... --adapter {folder}")
    say(f"  vlm-lora demo --adapter {folder}")
    return 0
