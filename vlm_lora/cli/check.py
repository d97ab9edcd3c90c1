"""Say what is in this data and what is wrong with it, without training.

It needs no model, and changes nothing.

  vlm-lora check ./photos
  vlm-lora check ./photos --model tiny --max-pixels 9216    also what it costs in tokens, and what is learnt
  vlm-lora check ./photos --val ./photos-test               also: is a held-out image among them, or one like it?
  vlm-lora check ./photos --html check.html                 a contact sheet for the eye
  vlm-lora check ./photos --write-clean ./photos-clean      a copy of the good rows, texts normalised

Exit code 0: every row can be used; 1: some cannot, each with file, line and reason.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlm_lora.cli.flags import READING, add_flags, config_of, given
from vlm_lora.console import Progress, one_line, say

EVERYDAY = ("data", "val", "prompt", "model", "max_pixels", "json", "html", "write_clean")
"""What ``--help`` shows; ``--help-all`` shows every flag."""

CHECKED = ("data", "val", *READING, "model", "min_pixels", "max_pixels", "max_tokens", "val_split", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, [name for name in CHECKED if name != "model"])
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="also count tokens, as this base model reads them: hub name, local folder, or 'tiny'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a contact sheet of pictures and texts")
    parser.add_argument("--write-clean", type=Path, metavar="FOLDER", help="write a normalised copy of the data")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.check.clean import check_clean_folder, check_target, write_clean
    from vlm_lora.check.dataset import check_dataset
    from vlm_lora.check.sheet import MAX_CARDS, write_sheet
    from vlm_lora.data.readers import DataSettings, below, read_dataset
    from vlm_lora.data.split import without_held_out
    from vlm_lora.errors import ConfigError

    config = config_of(options)
    counts_tokens = "model" in given(options)
    if not counts_tokens and (config.min_pixels or config.max_pixels):
        raise ConfigError("--min-pixels and --max-pixels are about tokens; say --model too")
    if options.write_clean:
        check_clean_folder(options.write_clean)
    if options.html:
        check_target(options.html, "--html")
    progress = Progress()

    def counted(rows: int) -> None:
        if rows % 1000 == 0:
            progress.show(f"Rows read: {rows:,}")

    settings = DataSettings(**config.reading)
    read = partial(read_dataset, settings=settings, keep=True, warn=say, progress=counted)
    dataset, held_out = read(config.sources), None
    if config.val:
        held_out = below(config.val, read(config.val).part("val", "test"))
        dataset = without_held_out(dataset, held_out, config.val)
    elif dataset.val or dataset.test:
        held_out = replace(dataset.part("val", "test"), bad=())
        dataset = without_held_out(dataset, held_out, "its own rows marked val or test")
    check = check_dataset(
        dataset,
        held_out,
        val_split=config.val_split,
        seed=config.seed,
        thumbnails=MAX_CARDS if options.html else 0,
        progress=partial(progress.count, "Images read:"),
    )
    if counts_tokens:
        from vlm_lora.check.tokens import with_tokens  # brings torch

        check = with_tokens(check, config, partial(progress.count, "Tokens counted, examples:"))
    facts = check.facts()
    if options.json:
        # A file name may be no UTF-8; backslashreplace writes of it what JSON reads
        print(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace").decode())
    else:
        print("\n".join(_lines(facts)))
    if options.html:
        write_sheet(options.html, check, facts, title=", ".join(Path(data).name for data in config.sources))
        say(f"Contact sheet: {options.html}")
    if options.write_clean:
        kept = check.examples if config.val else check.examples + check.held_out  # those marked so in the data itself
        write_clean(options.write_clean, kept, config.prompt, partial(progress.count, "Examples written:"))
        if any(example.weight > 1 for example in check.examples):
            say("The copy holds each answer once: write weights after it again where you use it, or clean each alone.")
        say(f"Clean copy of {len(kept):,} examples: {options.write_clean}")
    return 1 if facts["bad"] else 0


def _lines(facts: dict) -> Iterator[str]:
    """The facts as lines for a person."""
    from vlm_lora.data.readers import FORMATS
    from vlm_lora.data.readers.gather import told_boxes

    counts = f"{facts['examples']:,} examples, {facts['images']:,} images, {facts['answers']:,} answers"
    yield f"{facts['format']}: {counts}"
    if known := FORMATS.get(facts["format"]):
        yield f"the format: {known}"
    if facts["columns"]:
        yield one_line(f"taken for {facts['columns']}", 1000)
    if facts["unread"]:
        yield one_line(facts["unread"], 1000)
    if unused := facts.get("unused"):
        named = ", ".join(f"{name!r} in {times:,}" for name, times in unused.items())
        yield one_line(f"unused columns, and how many rows have them: {named}", 1000)
    if boxes := facts.get("boxes"):
        yield told_boxes(boxes)
    yield from (one_line(source, 1000) for source in facts["sources"])
    if text_only := facts.get("text_only"):
        yield f"answers without an image: {text_only:,}, learnt and never held out"
    if held_out := facts["held_out"]["examples"]:
        yield f"held out: {held_out:,} examples, {facts['held_out']['answers']:,} answers"
    if spread := facts["answers_per_example"]:
        yield f"answers per example: {spread['least']} to {spread['most']}, {spread['mean']} on average"
    if sizes := facts["image_sizes"]:
        named = [f"{name} {wide}x{high}" for name, (wide, high) in sizes.items()]
        yield f"image sizes: {', '.join(named)}"
    if frames := facts["several_frames"]:
        yield f"animations and the like, of which only the first picture is taken: {frames:,}"
    if scripts := facts["scripts"]:
        yield "scripts of the letters: " + ", ".join(f"{name} {share:.1%}" for name, share in scripts.items())
    cleaning = facts["cleaning"]
    if cleaning["texts"]:
        why = ", ".join(f"{name} {times:,}" for name, times in cleaning.items() if name != "texts")
        yield f"texts that --write-clean would change: {cleaning['texts']:,} ({why})"
    if facts["repeated"]:
        yield "said most often:"
        yield from (f"  {times:,} times: {one_line(text, 120)}" for text, times in facts["repeated"])
    yield from _listed(facts["duplicates"], "images that are there more than once", " = ")
    yield from _listed(facts["near_duplicates"], "pairs of images that look alike", " ~ ")
    if facts["near_duplicates"]["cut"]:
        yield "  the search for them ended there; there may be more"
    yield from _listed(
        facts["leaks"], "pairs of images, one in training and one held out, that are equal or look alike", " | "
    )
    if tokens := facts.get("tokens"):
        yield from _token_lines(tokens)
    for row in facts["bad"]:
        line = "" if row["line"] is None else f":{row['line']}"
        yield one_line(f"bad: {row['source']}{line}: {row['reason']}", 1000)
    yield f"{len(facts['bad']):,} bad rows" if facts["bad"] else "every row can be used"


def _listed(group: dict, what: str, between: str) -> Iterator[str]:
    if group["count"]:
        yield f"{what}: {group['count']:,}"
        yield from ("  " + between.join(one_line(name, 120) for name in names) for names in group["first"])


def _token_lines(tokens: dict) -> Iterator[str]:
    yield "tokens of the longest sequence of an example:"
    most = max(tokens["histogram"].values())
    for border, times in tokens["histogram"].items():
        yield f"  up to {int(border):>7,} {times:>9,} {'#' * -(-40 * times // most)}"
    if images := tokens["per_image"]:
        least, median, most = images["least"], images["median"], images["most"]
        yield f"tokens of an image: {least:,} to {most:,}, half of them {median:,} or less"
    yield f"tokens of an epoch: {tokens['packed']:,}, {tokens['learnt']:,} of them learnt"
    times = tokens["separate"] / max(1, tokens["packed"])
    yield f"with a sequence for each answer it would be {times:.1f} times that"
    shown = "".join(f"»{part['text']}«" if part["learnt"] else part["text"] for part in tokens["sample"])
    yield "the first example as the model reads it, what is learnt »marked«:"
    yield from ("  " + one_line(line, 1000) for line in shown.splitlines())
