"""Compare base and tuned on held-out data, with confidence intervals.

vlm-lora eval ./test.jsonl --adapter runs/photos
vlm-lora eval ./test.jsonl --adapter runs/photos --blank --json
vlm-lora eval ./test.jsonl --adapter runs/photos --against runs/photos-2      which of two is better
vlm-lora eval ./test.jsonl --adapter runs/photos --endpoint http://127.0.0.1:8000/v1      through a server
vlm-lora eval ./photos --adapter runs/photos --review > review.jsonl      its captions, the most doubtful first
torchrun --nproc-per-node 8 -m vlm_lora eval ./test.jsonl --adapter runs/photos      on eight GPUs
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_lora.cli.flags import READING, add_flags, add_precision, add_server, given
from vlm_lora.cli.several import team_of
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT, TrainConfig
from vlm_lora.console import Progress, one_line, say

if TYPE_CHECKING:
    from vlm_lora.data.readers import Dataset, DataSettings
    from vlm_lora.inference.caption import Decoding
    from vlm_lora.inference.captioner import Captioner
    from vlm_lora.inference.commonest import Commonest
    from vlm_lora.inference.evaluate import Speaker
    from vlm_lora.inference.evaluation import Evaluation
    from vlm_lora.inference.scores import Scores
    from vlm_lora.inference.team import Team

EVERYDAY = ("data", "adapter", "model", "against", "also", "blank", "swap", "review", "output", "json", "endpoint")
"""What ``--help`` shows; ``--help-all`` shows every flag."""

ASKED = ("prompt", "system")
"""Of the flags that say how data is read, those whose default is the adapter's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder or file of held-out images and answers")
    parser.add_argument("--adapter", metavar="RUN", help="run folder or adapter folder; without it the base alone")
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument(
        "--against",
        metavar="RUN",
        help="another adapter of the same base: which of the two is better",
    )
    add_flags(parser, [name for name in READING if name not in ASKED])
    parser.add_argument("--also", metavar="DATA", help="other data, to see what tuning made the model forget")
    parser.add_argument(
        "--level",
        choices=("auto", "word", "char"),
        default="auto",
        help="what the metrics compare; auto: characters for Chinese and Japanese, else words (default: auto)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="instruction for captions (default: the adapter's)")
    parser.add_argument(
        "--system", metavar="TEXT", help="system prompt of rows that have none of their own (default: the adapter's)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"where an answer is cut off (default: {DEFAULT_MAX_NEW_TOKENS}, or more for answers with boxes)",
    )
    add_precision(parser)
    parser.add_argument(
        "--blank", action="store_true", help="also answer with every image greyed out: what stays right is guessed"
    )
    add_server(
        parser,
        "evaluate what an OpenAI-compatible server says. --model is its name for the model, --adapter the run it "
        "serves. The base is compared if the server has it too",
    )
    parser.add_argument(
        "--swap",
        action="store_true",
        help="as --blank, and also with another image in its place: how many answers stay the same",
    )
    parser.add_argument(
        "--review",
        action="store_true",
        help="instead of all this, find wrong answers in the data: a JSON line for each, with how much the picture "
        "supports it, the most doubtful first, on stdout or in --output",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write predictions, scores and report there")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.data.readers import read_dataset
    from vlm_lora.errors import ConfigError, DataError
    from vlm_lora.inference.evaluate import evaluate

    team = team_of(options)
    if options.output and team.is_main:
        _make(options.output)  # before the work, not after it
    decoding = _decoding(options)
    if options.against and (not options.adapter or options.endpoint or options.review):
        raise ConfigError("--against needs --adapter to compare with, and goes with neither --endpoint nor --review.")
    speaker, prompt, system, theirs = _speaker(options)
    settings = _settings(options, prompt, system)
    whole = read_dataset(options.data, settings, keep=True, warn=say)
    dataset = whole.in_one if options.review else whole.part("test", "val")
    also = (
        [read_dataset(options.also, settings, keep=True, warn=say, format=None, columns=None)] if options.also else []
    )
    for path, read in zip((options.data, options.also), (dataset, *also), strict=False):
        for row in read.bad[:5]:
            say(one_line(f"Left out: {row.place}: {row.reason}."))
        if not read.examples:
            raise DataError(f"{path}: no usable example in it ({len(read.bad)} rows cannot be used).")
    if team.count > 1:  # else each would answer questions of its own
        team.require_same({"data": [read.fingerprint() for read in (dataset, *also)]})
    progress = Progress()
    if options.review:
        return _review(options, speaker, dataset, progress, team)
    evaluation = evaluate(
        speaker,
        dataset.examples,
        blanked=options.blank,
        swapped=options.swap,
        level=options.level,
        also=also[0].examples if also else (),
        prompt=prompt,
        commonest=_commonest(options.adapter),
        decoding=decoding,
        progress=lambda done, total: progress.count("Answers:", done, total),
        team=team,
    )
    other = _against(options, theirs, evaluation, progress, team) if theirs else None
    team.leave()
    failed = [example for part in (evaluation.scores, evaluation.scores.also) if part for example in part.failed]
    for example in failed:
        say(one_line(f"Left out: {example.source}: {example.reason}."))
    if team.is_main:
        _tell(options, evaluation, other, dataset.taken_for)
    left_out = sum(len(read.bad) for read in (dataset, *also)) + len(failed)
    if left_out:
        say(f"{left_out:,} rows were left out of this.")
        return 3
    return 0


def _tell(
    options: argparse.Namespace, evaluation: "Evaluation", other: "tuple[str, str, Scores] | None", taken_for: str
) -> None:
    """Into files, and on stdout."""
    from vlm_lora.inference.card import update_card
    from vlm_lora.inference.report import write_report
    from vlm_lora.inference.verdict import columns_of, counts, summary, tables_as_text, versus
    from vlm_lora.model.adapters.base import find_adapter, write_json

    scores = evaluation.scores
    hub = options.data.startswith("hf:")
    name = options.data if hub else os.path.basename(os.path.abspath(options.data)) or options.data
    if options.output:
        evaluation.write(options.output)
        command = shlex.join(["vlm-lora", *sys.argv[1:]])
        if other:
            write_json(other[2].to_json(), options.output / "against.json")
        report = write_report(options.output, evaluation, title=name, command=command, other=other)
        say(f"Report with pictures: {report}")
    if options.adapter and not options.endpoint and (card := update_card(find_adapter(options.adapter), scores, name)):
        say(f"Model card: {card}")
    if options.json:
        print(json.dumps(scores.to_json() | ({"against": {"run": other[1], **other[2].to_json()}} if other else {})))
    else:
        told = "; ".join(counts(task, of) for task, of in scores.tasks.items())
        print(f"{told}, {taken_for}\n")
        print(tables_as_text(scores))
        print("\n" + "\n".join(summary(scores)))
        if other:
            print(f"\n{other[0]} beside {other[1]}:\n")
            print(tables_as_text(other[2], columns_of(*other[:2])))
            print("\n" + "\n".join(versus(other[2], *other[:2])))
        if scores.also:
            print(f"\nOn {options.also}, to see what was forgotten:\n")
            print(tables_as_text(scores.also))
            print("\n" + "\n".join(summary(scores.also)))


def _make(output: Path) -> None:
    from vlm_lora.errors import ConfigError

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be made a folder ({error.strerror}); give another name."
        ) from error


def _speaker(options: argparse.Namespace) -> "tuple[Speaker, str, str, Captioner | None]":
    """What is evaluated, the instruction for captions, the system prompt of rows without one; and --against."""
    if not options.endpoint:
        from vlm_lora.inference.captioner import Captioner

        how: dict[str, Any] = {name: getattr(options, name) for name in ("prompt", "system", "dtype", "load_in_4bit")}
        if options.against:  # loaded now: what is wrong with it is said before the work
            captioner, other = Captioner.load_several(options.model, [options.adapter, options.against], **how)
        else:
            captioner, other = Captioner.load(options.model, options.adapter, **how), None
        return captioner, captioner.prompt, captioner.system, other
    from vlm_lora.errors import ConfigError
    from vlm_lora.inference.endpoint import Endpoint
    from vlm_lora.inference.served import Trained

    if options.load_in_4bit:
        raise ConfigError("--load-in-4bit: the server at --endpoint holds the model; have it quantise.")
    trained = Trained.load(options.adapter) if options.adapter else None
    server = Endpoint(options.endpoint, model=options.model, concurrency=options.concurrency, trained=trained)
    system = options.system if options.system is not None else trained.system if trained else ""
    return server, options.prompt or (trained.prompt if trained else DEFAULT_PROMPT), system, None


def _settings(options: argparse.Namespace, prompt: str, system: str) -> "DataSettings":
    """How the data is read for a model that is asked so."""
    from vlm_lora.data.readers import DataSettings

    config = TrainConfig(data=options.data, prompt=prompt, system=system or None).replace(**_reading(options))
    return DataSettings(**config.reading)


def _against(
    options: argparse.Namespace, theirs: "Captioner", evaluation: "Evaluation", progress: Progress, team: "Team"
) -> "tuple[str, str, Scores]":
    """The names of --adapter and --against, and the scores of the one against the other.

    The other is asked for captions as it was trained to be, unless --prompt or --system say how.
    """
    from vlm_lora.data.readers import read_dataset
    from vlm_lora.inference.evaluate import against

    settings = _settings(options, theirs.prompt, theirs.system)
    dataset = read_dataset(options.data, settings, keep=True, warn=say).part("test", "val")
    names = [Path(name).resolve() for name in (options.adapter, options.against)]
    ours, other = (path.parent.name if path.name == "adapter" else path.name for path in names)
    if ours == other:
        ours, other = options.adapter, options.against

    def count(done: int, total: int) -> None:
        progress.count(f"Answers of {other}:", done, total)

    return ours, other, against(evaluation, theirs, dataset.examples, _decoding(options), count, team)


def _decoding(options: argparse.Namespace) -> "Decoding | None":
    from vlm_lora.inference.caption import Decoding

    return None if options.max_new_tokens is None else Decoding(max_new_tokens=options.max_new_tokens)


def _commonest(adapter: str | None) -> "Commonest | None":
    """The commonest answers of what the adapter was trained on, if its run is here."""
    from vlm_lora.inference.commonest import Commonest
    from vlm_lora.model.adapters.base import find_adapter

    return Commonest.read(find_adapter(adapter).parent) if adapter else None


def _review(
    options: argparse.Namespace, captioner: "Speaker", dataset: "Dataset", progress: Progress, team: "Team"
) -> int:
    from vlm_lora.errors import ConfigError
    from vlm_lora.inference.captioner import Captioner
    from vlm_lora.inference.review import review

    if options.blank or options.swap or options.also or options.json:
        raise ConfigError("--review answers nothing: leave out --blank, --swap, --also and --json.")
    if not isinstance(captioner, Captioner):
        raise ConfigError("--review needs the model's probabilities, which --endpoint does not give: leave it out.")
    rows = review(captioner, dataset.examples, lambda done, total: progress.count("Reviewed:", done, total), team)
    team.leave()
    lines = "".join(row.to_json() + "\n" for row in rows)
    if not team.is_main:
        lines = ""
    elif options.output:
        (options.output / "review.jsonl").write_text(lines, encoding="utf-8")
        say(f"{len(rows):,} answers, the most doubtful first: {options.output / 'review.jsonl'}")
    else:
        sys.stdout.write(lines)
    if text_only := sum(len(example.dialogues) for example in dataset.examples if not example.images):
        say(f"{text_only:,} answers of text alone are left out: they have no picture.")
    left_out = len(dataset.bad) + sum(row.error is not None for row in rows)
    if left_out:
        say(f"{left_out:,} rows could not be looked at.")
    return 3 if left_out else 0


def _reading(options: argparse.Namespace) -> dict:
    return {name: value for name, value in given(options).items() if name in READING and name not in ASKED}
