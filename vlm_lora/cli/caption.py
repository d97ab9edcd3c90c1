"""Caption images: files, all images in folders, or a list of them.

One image: its caption alone. Several: a line each, as `--format` says. Stopped? Say the same again: images that have
a caption in --output, or a sidecar file, are not captioned twice.

  vlm-lora caption cat.jpg --adapter runs/photos
  vlm-lora caption ./more --adapter runs/photos --format jsonl --output captions.jsonl
  vlm-lora caption ./more --adapter runs/photos --format sidecar        writes cat.txt beside cat.jpg
  vlm-lora caption ./more --adapter base --adapter runs/photos          base and tuned side by side
  find . -name '*.jpg' | vlm-lora caption - --endpoint http://127.0.0.1:8000/v1      through a server's model
"""

import argparse
import glob
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

from vlm_lora.cli.console import Progress, say
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT
from vlm_lora.errors import ConfigError, DataError

BASE = "base"
"""What to give as --adapter for the base alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, folders of images, patterns; - reads names from stdin"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="a file with the name of an image or folder a line")
    parser.add_argument("--recursive", action="store_true", help="also look in folders inside folders")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="RUN",
        help="run folder, adapter folder or hub name; without it the base alone. Several times: a caption of each, "
        f"side by side ({BASE}: of the base alone)",
    )
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask about each image (default: the adapter's)")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="written before each caption, as it is")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="written behind each caption, as it is")
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "metadata", "sidecar"),
        default="text",
        help="text: path and caption; jsonl: one object a line; metadata: a metadata.jsonl beside the images, which "
        "can be trained on; sidecar: a .txt beside each image (default: text)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    parser.add_argument("--overwrite", action="store_true", help="caption anew what has a caption")
    parser.add_argument("--append", action="store_true", help="sidecar: add the caption as a line to the file's own")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be captioned")
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search of so many (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--batch-size", default="auto", metavar="N", help="images at a time (default: auto, what fits into memory)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--endpoint", metavar="URL", help="let an OpenAI-compatible server caption; --model is its name for the model"
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at a time to --endpoint (default: 16)"
    )


def run(options: argparse.Namespace) -> int:
    adapters = list(dict.fromkeys(options.adapter or []))
    batch_size = _checked(options, adapters)
    paths = list(dict.fromkeys(_images(options)))
    if not paths:
        raise ConfigError(f"No image in {', '.join(options.paths) or options.list}.")
    sink = _Sidecars(paths, options) if options.format == "sidecar" else _Rows(paths, options)
    left = [path for path in paths if not sink.has(path)]
    if len(left) < len(paths):
        say(f"{len(paths) - len(left):,} images have a caption already; --overwrite captions them anew.")
    if options.dry_run:
        for path in left:
            print(_printable(_one_line(str(path))))
        say(f"{len(left):,} images would be captioned.")
        return 0
    if not left:
        return 0
    columns = _captions(options, adapters, batch_size, left)
    if len(columns) > 1 and options.format == "text":
        say("Columns: image, " + ", ".join(adapters))
    alone = [Path(given) for given in options.paths] == paths and len(paths) == 1
    progress, started, failed = Progress(), time.monotonic(), 0
    with closing(sink):
        for done, results in enumerate(zip(*columns, strict=True), start=1):
            error = next((result.error for result in results if result.error is not None), None)
            failed += error is not None
            if error is not None and not sink.holds_errors:
                say(f"{_one_line(results[0].image)}: {error}")
            texts = None if error is not None else [f"{options.prefix}{r.text}{options.suffix}" for r in results]
            sink.write(left[done - 1], texts, error, alone)
            if not alone:
                rate = done / (time.monotonic() - started)
                progress.show(f"{done:,} of {len(left):,} images, {rate:.1f} a second", last=done == len(left))
    if failed:
        say(f"{failed:,} of {len(left):,} images could not be captioned.")
        return 1 if failed == len(paths) else 3
    return 0


def _checked(options: argparse.Namespace, adapters: list[str]) -> int | None:
    """The batch size, None for auto. Raises ConfigError for flags that do not go together."""
    if not options.paths and not options.list:
        raise ConfigError("no images given; name files or folders, or give --list FILE.")
    if options.format == "sidecar" and options.output:
        raise ConfigError("--format sidecar writes beside the images; leave out --output.")
    if options.append and (options.format != "sidecar" or options.overwrite):
        raise ConfigError("--append adds to the files of --format sidecar, and goes without --overwrite.")
    if options.overwrite and options.format in ("text", "jsonl") and not options.output:
        raise ConfigError("--overwrite is for --output FILE, --format sidecar and --format metadata.")
    if len(adapters) > 1 and options.format not in ("text", "jsonl"):
        raise ConfigError("Captions of several adapters go side by side into --format text or jsonl.")
    if options.endpoint and (adapters or options.num_beams > 1):
        raise ConfigError(
            "--endpoint: the server holds the model. Name it with --model (an adapter served by vLLM has its own "
            "name), give the --prompt it was trained with, and leave out --adapter and --num-beams."
        )
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency is {options.concurrency}; expected 1 or more requests.")
    if options.batch_size == "auto":
        return None
    if not options.batch_size.isdecimal() or int(options.batch_size) < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more images, or auto.")
    return int(options.batch_size)


def _captions(
    options: argparse.Namespace, adapters: list[str], batch_size: int | None, paths: Sequence[Path]
) -> list[Iterator]:
    """For each adapter an iterator of the captions, in the order of the images."""
    from vlm_lora.inference.captioner import Captioner, Decoding

    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if options.endpoint:
        from vlm_lora.inference.endpoint import Endpoint

        server = Endpoint(options.endpoint, model=options.model, concurrency=options.concurrency)
        return [server.caption(paths, options.prompt or DEFAULT_PROMPT, decoding=decoding)]
    given = [None if adapter == BASE else adapter for adapter in adapters]
    how = {"prompt": options.prompt, "dtype": options.dtype}
    if len(given) > 1:
        captioners = Captioner.load_several(options.model, given, **how)
    else:
        captioners = [Captioner.load(options.model, *given, **how)]
    # In step with each other: what one computes for an image, the next finds in memory.
    return [captioner.caption(paths, batch_size=batch_size, decoding=decoding) for captioner in captioners]


# -- what to caption -----------------------------------------------------------------------------------------


def _images(options: argparse.Namespace) -> Iterator[Path]:
    """Files as they are given, and the images in folders by name; a file need not look like an image."""
    from vlm_lora.data.readers.folders import images_below, is_image_name, visible_files

    names = list(options.paths)
    if options.list:
        try:
            names += _names(options.list.read_bytes())
        except OSError as error:
            raise ConfigError(f"--list {options.list}: cannot be read ({error.strerror}).") from error
    for given in names:
        for name in _names(sys.stdin.buffer.read()) if given == "-" else [given]:
            path = Path(name)
            if path.is_dir():
                inside = images_below(path) if options.recursive else visible_files(path, below=False)
                yield from filter(is_image_name, inside)
            elif os.path.lexists(path):
                yield path
            elif found := sorted(glob.glob(name, recursive=True)):
                yield from map(Path, found)
            else:
                raise ConfigError(f"{_one_line(name)}: there is no such file or folder.")


def _names(data: bytes) -> list[str]:
    """The names in a list: one a line, or ended by NUL bytes, as `find -print0` writes them."""
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    lines = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    return [name for name in lines if name]


# -- where captions go ---------------------------------------------------------------------------------------


class _Rows:
    """A line an image, in a file that an interrupted run goes on with, or on stdout."""

    def __init__(self, paths: Sequence[Path], options: argparse.Namespace):
        self.format, self.file = options.format, options.output
        self.names = list(dict.fromkeys(options.adapter or []))
        if self.format == "metadata":
            folders = [Path(given) for given in options.paths if Path(given).is_dir()]
            if not self.file and (len(options.paths), len(folders)) != (1, 1):
                raise ConfigError("--format metadata: say with --output where; it goes beside or above the images.")
            self.file = self.file or folders[0] / "metadata.jsonl"
            above = Path(os.path.abspath(self.file)).parent
            if outside := [p for p in paths if not Path(os.path.abspath(p)).is_relative_to(above)]:
                raise ConfigError(f"{_one_line(str(outside[0]))} is not below {above}, where {self.file.name} goes.")
        if self.file and not self.file.absolute().parent.is_dir():
            raise ConfigError(f"--output {self.file}: there is no folder {self.file.parent}; make it first.")
        self.holds_errors = self.format == "jsonl"
        self.kept = [] if options.overwrite else self._lines()
        self.done = {name for name, _ in self.kept}
        self.stream: IO[str] | None = None

    def _name(self, path: Path) -> str:
        """An image's name in the file."""
        if self.format == "metadata":
            return Path(os.path.abspath(path)).relative_to(Path(os.path.abspath(self.file)).parent).as_posix()
        return str(path) if self.format == "jsonl" else _one_line(str(path))

    def has(self, path: Path) -> bool:
        return self._name(path) in self.done

    def _lines(self) -> list[tuple[str, str]]:
        """(image, line) of the captions in the file. A line cut off goes, and so do errors: they are tried again."""
        if not self.file or not self.file.exists():
            return []
        kept = []
        try:
            whole = self.file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise ConfigError(f"--output {self.file}: cannot be read ({error.strerror}).") from error
        if (cut := whole.pop()) and self.format != "text":
            with suppress(ValueError):  # a whole row that only lacks its line break, as editors leave it
                json.loads(cut)
                whole.append(cut)
        for number, line in enumerate(whole, start=1):
            if not line.strip():
                continue
            try:
                if self.format == "text":
                    name, tab, _ = line.partition("\t")
                    if not tab:
                        raise ValueError("no tab")
                    kept.append((name, line))
                else:
                    row = json.loads(line)
                    name = row["file_name" if self.format == "metadata" else "image"]
                    if not isinstance(name, str):
                        raise TypeError("no name")
                    if "error" not in row:
                        kept.append((name, line))
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{self.file}:{number}: is not a line that `caption --format {self.format}` wrote, so nothing is "
                    "added to this file. Give another --output, or --overwrite to replace it."
                ) from None
        return kept

    def _open(self) -> IO[str]:
        if not self.file:
            return sys.stdout
        # Written anew and put in place at once: what was there is whole or untouched.
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            text = "".join(line + "\n" for _, line in self.kept)
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            os.replace(temporary, self.file)
            return self.file.open("a", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise ConfigError(f"--output {self.file}: cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        if self.file and self.stream:
            self.stream.close()

    def write(self, path: Path, texts: list[str] | None, error: str | None, alone: bool) -> None:
        if self.format == "text":
            if texts is None:
                return
            line = texts[0] if alone and not self.file else "\t".join([self._name(path), *map(_spaced, texts)])
            line = line if self.file else _printable(line)
        elif self.format == "metadata":
            if texts is None:
                return
            line = _json({"file_name": self._name(path), "text": texts[0]})
        elif texts is None:
            line = _json({"image": self._name(path), "error": error})
        elif len(texts) == 1:
            line = _json({"image": self._name(path), "caption": texts[0]})
        else:
            line = _json({"image": self._name(path), "captions": dict(zip(self.names, texts, strict=True))})
        # Opened for the first caption: where there never is one, an earlier file stays.
        self.stream = self.stream or self._open()
        print(line, file=self.stream, flush=True)


class _Sidecars:
    """A caption file beside each image: .txt, or the .caption that is there already."""

    holds_errors = False

    def __init__(self, paths: Sequence[Path], options: argparse.Namespace):
        self.overwrite, self.append = options.overwrite, options.append
        of: dict[Path, Path] = {}
        for path in paths:
            other = of.setdefault(self._file(path), path)
            if other != path:
                shared = self._file(path).name
                raise ConfigError(f"{_one_line(f'{other} and {path}')} would share one caption file, {shared}.")

    def _file(self, path: Path) -> Path:
        other = path.with_suffix(".caption")
        return other if other.exists() else path.with_suffix(".txt")

    def has(self, path: Path) -> bool:
        return not (self.overwrite or self.append) and self._file(path).exists()

    def close(self) -> None:
        pass

    def write(self, path: Path, texts: list[str] | None, error: str | None, alone: bool) -> None:
        if texts is None:
            return
        target, text = self._file(path), texts[0] + "\n"
        try:
            before = target.read_text(encoding="utf-8") if self.append and target.exists() else ""
            before += "\n" if before and not before.endswith("\n") else ""
            if f"\n{text}" in f"\n{before}":  # said the last time, before the run was stopped
                return
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.write_text(before + text, encoding="utf-8")
            os.replace(temporary, target)
        except (OSError, UnicodeDecodeError) as failure:
            raise DataError(f"{_one_line(str(target))}: cannot be written ({failure}).") from failure


def _json(row: dict) -> str:
    try:
        line = json.dumps(row, ensure_ascii=False)
        line.encode()
    except UnicodeEncodeError:  # a name of bytes that are no text: JSON has a way to write it
        return json.dumps(row)
    return line


CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"


def _one_line(name: str) -> str:
    """A file's name, with line breaks, tabs and what steers a terminal written as in Python: \\n."""
    return re.sub(CONTROL, lambda char: char[0].encode("unicode_escape").decode(), name)


def _spaced(caption: str) -> str:
    return re.sub(CONTROL, " ", caption)


def _printable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
