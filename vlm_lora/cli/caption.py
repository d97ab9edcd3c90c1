"""Caption images: files, all images in folders, or a list of them.

One image: its caption alone. Several: a line each, as `--format` says. Stopped? Run the same command again: images that
have a caption in --output, or a sidecar file, are not captioned twice.

  vlm-lora caption cat.jpg --adapter runs/photos
  vlm-lora caption ./more --adapter runs/photos --format jsonl --output captions.jsonl
  vlm-lora caption ./more --adapter runs/photos --format sidecar        writes cat.txt beside cat.jpg
  vlm-lora caption ./more --adapter base --adapter runs/photos          base and tuned side by side
  find . -name '*.jpg' | vlm-lora caption - --endpoint http://127.0.0.1:8000/v1      through a server's model
  torchrun --nproc-per-node 8 -m vlm_lora caption ./more --adapter runs/photos --output captions.txt      on eight GPUs
"""

import argparse
import glob
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_lora.cli.flags import add_precision, add_server
from vlm_lora.cli.several import team_of
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT
from vlm_lora.console import Progress, say
from vlm_lora.errors import ConfigError
from vlm_lora.inference.sinks import (
    DECODING,
    STEERING,
    NotWritten,
    Rows,
    Sidecars,
    Stdout,
    made_with,
    one_line,
    printable,
)
from vlm_lora.inference.team import share_of

if TYPE_CHECKING:
    from vlm_lora.inference.caption import Caption, Decoding
    from vlm_lora.inference.team import Team

EVERYDAY = (
    "paths",
    "recursive",
    "adapter",
    "model",
    "prompt",
    "format",
    "output",
    "overwrite",
    "endpoint",
    "begin_with",
)
EVERYDAY += ("avoid", "words", "max_new_tokens", "temperature")
"""What ``--help`` shows; ``--help-all`` shows every flag."""

GATHER_SECONDS = 2.0
"""How long a process captions before the main one hears of it, and what it was at when that is over: so much is lost
where they are killed."""

BASE = "base"
"""What to give as --adapter for the base alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, folders of images, patterns; - reads names from stdin"
    )
    group = parser.add_argument_group("captions")
    group.add_argument("--list", type=Path, metavar="FILE", help="a file with the name of an image or folder a line")
    group.add_argument("--recursive", action="store_true", help="also look in folders inside folders")
    group.add_argument(
        "--adapter",
        action="append",
        metavar="RUN",
        help="run folder, adapter folder or hub name; without it the base alone. Several times: a caption of each, "
        f"side by side ({BASE}: of the base alone)",
    )
    group.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    group.add_argument("--prompt", metavar="TEXT", help="instruction for each image (default: the adapter's)")
    group.add_argument("--system", metavar="TEXT", help="system prompt to ask with (default: the adapter's)")
    group.add_argument("--prefix", default="", metavar="TEXT", help="text written before each caption")
    group.add_argument("--suffix", default="", metavar="TEXT", help="text written after each caption")
    group.add_argument(
        "--format",
        choices=("text", "jsonl", "metadata", "sidecar"),
        default="text",
        help="text: path and caption; jsonl: one object a line; metadata: a metadata.jsonl beside the images, which "
        "can be trained on; sidecar: a .txt beside each image (default: text)",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="also caption images that have a caption. A sidecar or metadata file keeps its old text in a copy (.old)",
    )
    group.add_argument("--append", action="store_true", help="sidecar: add the caption as a line to the file's own")
    group.add_argument("--dry-run", action="store_true", help="only list what would be captioned")
    group.add_argument(
        "--batch-size", default="auto", metavar="N", help="images at a time (default: auto, what fits into memory)"
    )
    add_precision(group)
    add_server(
        group,
        "let an OpenAI-compatible server caption. --model is its name for the model, --adapter the run it serves: its "
        "prompt is used, and the server's images and chat template are compared with those of the training",
    )
    _add_decoding(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help=f"the most tokens of a caption; a word is one or two (default: {DEFAULT_MAX_NEW_TOKENS})",
    )
    group.add_argument("--num-beams", type=int, default=1, metavar="N", help="beams of a beam search (default: 1)")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0: the likeliest words; above 0 they are drawn, and vary (default: 0)",
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus sampling (default: 1)")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest (default: 0, all)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="sample from those at least X times as likely as the first",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: make what was said less likely (default: 1)",
    )
    group.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N", help="never repeat N tokens in a row")
    group = parser.add_argument_group("content")
    group.add_argument("--begin-with", default="", metavar="TEXT", help="start of the caption; the model continues it")
    group.add_argument(
        "--avoid",
        action="append",
        metavar="WORDS",
        help="words or phrases, separated by commas, that no caption may say",
    )
    group.add_argument("--avoid-file", type=Path, metavar="FILE", help="the same from a file, one a line")
    group.add_argument(
        "--require",
        action="append",
        metavar="WORDS",
        help="words or phrases, separated by commas, that each caption must say; else it is sampled again, and then "
        "reported",
    )
    group.add_argument("--attempts", type=int, default=5, metavar="N", help="how often to sample again (default: 5)")
    group.add_argument("--words", metavar="N..M", help="the least and most words of a caption, as 10..30")
    group.add_argument(
        "--whole-sentences", action="store_true", help="where a limit cuts a sentence off, end after the last whole one"
    )
    group.add_argument("--cut-loops", action="store_true", help="end the caption where it repeats itself")


def run(options: argparse.Namespace) -> int:
    adapters = list(dict.fromkeys(options.adapter or []))
    batch_size = _checked(options, adapters)
    decoding = _decoding(options)
    team = team_of(options)
    work = _Work()
    # Folders, stdin and what has a caption already are looked at once: all have to caption parts of the same.
    found, left = team.on_main(lambda: work.begin(options, adapters, decoding))
    if not left:
        team.leave()
        return 0
    columns = _captions(options, adapters, batch_size, share_of(team, left), decoding)
    if len(columns) > 1 and options.format == "text":
        say("Columns: image, " + ", ".join(adapters))
    work.write(options, _in_order(zip(*columns, strict=True), team), len(left))
    failed = team.on_main(lambda: work.failed)
    team.leave()
    if failed:
        say(f"{failed:,} of {len(left):,} images could not be captioned.")
        return 1 if failed == found else 3
    return 0


class _Work:
    """What the main process does alone: find the images, and write their captions."""

    def __init__(self) -> None:
        self.sink: Stdout | Rows | Sidecars | None = None
        self.alone = False
        self.failed = 0

    def begin(self, options: argparse.Namespace, adapters: list[str], decoding: "Decoding") -> tuple[int, list[Path]]:
        """How many images there are, and those that are to be captioned; none where they are only listed."""
        paths = list(dict.fromkeys(_images(options)))
        if not paths:
            raise ConfigError(f"No image in {', '.join(options.paths) or options.list}.")
        self.alone = [Path(given) for given in options.paths] == paths and len(paths) == 1
        self.sink = sink = _sink(options, adapters, paths, self.alone, decoding)
        left = [path for path in paths if not sink.has(path)]
        if len(left) < len(paths):
            say(f"{len(paths) - len(left):,} images have a caption already; --overwrite captions them again.")
        if options.dry_run:
            for path in left:
                print(printable(one_line(path)))
            say(f"{len(left):,} images would be captioned.")
            left = []
        return len(paths), left

    def write(self, options: argparse.Namespace, rows: "Iterator[tuple[Caption, ...]]", total: int) -> None:
        """Each image's captions as they come, in the main process; the others only help."""
        if self.sink is None:
            deque(rows, maxlen=0)  # it is given none
            return
        progress, started = Progress(), time.monotonic()
        with closing(self.sink) as sink:
            for done, results in enumerate(rows, start=1):
                image = results[0].image
                error = next((result.error for result in results if result.error is not None), None)
                texts = None if error is not None else [f"{options.prefix}{r.text}{options.suffix}" for r in results]
                try:
                    sink.write(Path(image), texts, error)
                except NotWritten as reason:
                    error = str(reason)
                self.failed += error is not None
                if error is not None and not sink.holds_errors:
                    say(f"{one_line(image)}: {error}")
                if not self.alone:
                    rate = done / (time.monotonic() - started)
                    progress.show(f"{done:,} of {total:,} images, {rate:.1f} a second", last=done == total)


def _in_order(rows: "Iterator[tuple[Caption, ...]]", team: "Team") -> "Iterator[tuple[Caption, ...]]":
    """The rows of all processes, which have one image after the other in turn, in the order of the images; to the main
    process alone."""
    if team.count == 1:
        yield from rows
        return
    waiting: list[deque] = [deque() for _ in range(team.count)]
    turn, ended = 0, False
    while not ended:
        own, began = [], time.monotonic()
        while (row := next(rows, None)) is not None:
            own.append(row)
            if time.monotonic() - began > GATHER_SECONDS:
                break
        shares = team.gather((own, row is None))
        ended = all(last for _, last in shares)
        for queue, (share, _) in zip(waiting, shares, strict=True):
            queue.extend(share)
        while team.is_main and waiting[turn % team.count]:
            yield waiting[turn % team.count].popleft()
            turn += 1


def _checked(options: argparse.Namespace, adapters: list[str]) -> int | None:
    """The batch size, None for auto. Raises ConfigError for flags that do not go together."""
    if not options.paths and not options.list:
        raise ConfigError("no images given; name files or folders, or give --list FILE.")
    if options.format == "sidecar" and options.output:
        raise ConfigError("--format sidecar writes beside the images; leave out --output.")
    if options.append and (options.format != "sidecar" or options.overwrite):
        raise ConfigError("--append adds to the files of --format sidecar; it does not go with --overwrite.")
    if options.overwrite and options.format in ("text", "jsonl") and not options.output:
        raise ConfigError("--overwrite is for --output FILE, --format sidecar and --format metadata.")
    if len(adapters) > 1 and options.format not in ("text", "jsonl"):
        raise ConfigError("Captions of several adapters go side by side into --format text or jsonl.")
    if options.endpoint and (len(adapters) > 1 or BASE in adapters):
        raise ConfigError(
            "--endpoint: the server holds the model. Name it with --model (an adapter served by vLLM has its own "
            "name), and give with --adapter the one run that it serves."
        )
    if options.endpoint and options.load_in_4bit:
        raise ConfigError("--load-in-4bit: the server at --endpoint holds the model; have it quantise.")
    for name in ("prompt", "system", "prefix", "suffix"):
        if printable(text := getattr(options, name) or "", "utf-8") != text:
            raise ConfigError(f"--{name} holds bytes that are not UTF-8; expected text.")
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency is {options.concurrency}; expected 1 or more requests.")
    if options.batch_size == "auto":
        return None
    if not options.batch_size.isdecimal() or int(options.batch_size) < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more images, or auto.")
    return int(options.batch_size)


def _decoding(options: argparse.Namespace) -> "Decoding":
    from vlm_lora.inference.caption import Decoding  # here, as it brings PIL

    fields = {name: getattr(options, name) for name in (*DECODING, *STEERING)}
    fields |= {name: _parted(getattr(options, name)) for name in ("avoid", "require")}
    if options.avoid_file:
        try:
            lines = options.avoid_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"--avoid-file {options.avoid_file}: cannot be read ({why}).") from error
        fields["avoid"] += tuple(line.strip() for line in lines if line.strip())
    if options.words is not None:
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", options.words.strip())
        if not ends:
            raise ConfigError(f"--words is {options.words!r}; expected the least and the most, as 10..30.")
        fields["words"] = (int(ends[1]), int(ends[2]))
    decoding = Decoding(**fields)
    if options.endpoint:
        decoding.require_served()
    return decoding


def _parted(given: list[str] | None) -> tuple[str, ...]:
    """Words and phrases of a flag that may be given several times, each with commas."""
    return tuple(part.strip() for text in given or () for part in text.split(",") if part.strip())


def _sink(
    options: argparse.Namespace, adapters: list[str], paths: Sequence[Path], alone: bool, decoding: "Decoding"
) -> Stdout | Rows | Sidecars:
    inputs = [options.list] if options.list else []
    if options.format == "sidecar":
        return Sidecars(paths, overwrite=options.overwrite, append=options.append, inputs=inputs)
    file = options.output
    if options.format == "metadata" and not file:
        folders = [Path(given) for given in options.paths if Path(given).is_dir()]
        if (len(options.paths), len(folders)) != (1, 1):
            raise ConfigError("--format metadata: say with --output where; it goes beside or above the images.")
        file = folders[0] / "metadata.jsonl"
    if not file:
        return Stdout(options.format, adapters=adapters, alone=alone)
    given = {name: getattr(options, name) for name in ("model", "prompt", "endpoint", "prefix", "suffix")}
    given |= {"system": options.system} if options.system is not None else {}
    given |= {"load_in_4bit": True} if options.load_in_4bit else {}
    rows = {"made_with": made_with(decoding, adapters, **given), "adapters": adapters, "inputs": inputs}
    return Rows(paths, options.format, file, overwrite=options.overwrite, **rows)


def _captions(
    options: argparse.Namespace,
    adapters: list[str],
    batch_size: int | None,
    paths: Sequence[Path],
    decoding: "Decoding",
) -> list[Iterator]:
    """For each adapter an iterator of the captions, in the order of the images."""
    if options.endpoint:
        from vlm_lora.inference.endpoint import Endpoint

        trained = None
        if adapters:
            from vlm_lora.inference.served import Trained

            trained = Trained.load(adapters[0])
        server = Endpoint(options.endpoint, model=options.model, concurrency=options.concurrency, trained=trained)
        prompt = options.prompt or (trained.prompt if trained else DEFAULT_PROMPT)
        system = options.system if options.system is not None else trained.system if trained else ""
        return [server.caption(paths, prompt, system=system, decoding=decoding)]
    from vlm_lora.inference.captioner import Captioner  # here, as it brings torch, which --endpoint does without

    given = [None if adapter == BASE else adapter for adapter in adapters or [BASE]]
    how = {name: getattr(options, name) for name in ("prompt", "system", "dtype", "load_in_4bit")}
    captioners = Captioner.load_several(options.model, given, **how)
    # In step with each other: what one computes for an image, the next finds in memory.
    return [captioner.caption(paths, batch_size=batch_size, decoding=decoding) for captioner in captioners]


# -- what to caption -----------------------------------------------------------------------------------------


def _images(options: argparse.Namespace) -> Iterator[Path]:
    """Files as they are given, and the images in folders by name; a file need not look like an image."""
    from vlm_lora.data.readers.folders import images_below, is_image_name, visible_files

    def inside(path: Path) -> Iterator[Path]:
        if not path.is_dir():
            yield path
            return
        files = images_below(path) if options.recursive else visible_files(path, below=False)
        yield from filter(is_image_name, files)

    names = list(options.paths)
    if options.list:
        try:
            names += _names(options.list.read_bytes())
        except OSError as error:
            raise ConfigError(f"--list {options.list}: cannot be read ({error.strerror}).") from error
    for given in names:
        for name in _names(sys.stdin.buffer.read()) if given == "-" else [given]:
            name = name if os.path.lexists(name) else os.path.expanduser(name)
            paths = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
            if not paths:
                raise ConfigError(f"{one_line(name)}: there is no such file or folder.")
            for path in paths:  # a shell that expands the pattern gives the same
                yield from inside(Path(path))


def _names(data: bytes) -> list[str]:
    """The names in a list: one a line, or ended by NUL bytes, as `find -print0` writes them."""
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    lines = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    return [name for name in lines if name]
