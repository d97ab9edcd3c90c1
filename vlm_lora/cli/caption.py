"""Caption images: files, or all images in folders.

One image: its caption alone. Several: a line each, as `--format` says.

  vlm-lora caption cat.jpg --adapter runs/photos
  vlm-lora caption ./more --adapter runs/photos --format jsonl > captions.jsonl
  vlm-lora caption ./more --adapter runs/photos --format sidecar        writes cat.txt beside cat.jpg
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vlm_lora.cli.console import Progress, say
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS
from vlm_lora.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files and folders of images")
    parser.add_argument("--adapter", metavar="RUN", help="run folder or adapter folder; without it the base alone")
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask about each image (default: the adapter's)")
    parser.add_argument("--recursive", action="store_true", help="also look in folders inside folders")
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "sidecar"),
        default="text",
        help="text: path and caption; jsonl: one object a line; sidecar: a .txt beside each image (default: text)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace sidecar files that are there already")
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def run(options: argparse.Namespace) -> int:
    if options.format == "sidecar" and options.output:
        raise ConfigError("--format sidecar writes beside the images; leave out --output.")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more images.")
    paths = list(_images(options.paths, options.recursive))
    if not paths:
        raise ConfigError(f"No image in {', '.join(options.paths)}.")
    if options.format == "sidecar":
        paths = _without_sidecar(paths, options.overwrite)

    from vlm_lora.inference.captioner import Captioner, Decoding

    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    captioner = Captioner.load(options.model, options.adapter, prompt=options.prompt, dtype=options.dtype)
    alone = len(options.paths) == 1 and Path(options.paths[0]).is_file() and options.format == "text"
    output = options.output.open("w", encoding="utf-8") if options.output else sys.stdout
    progress, started, failed = Progress(), time.monotonic(), 0
    results = captioner.caption(paths, batch_size=options.batch_size, decoding=decoding)
    for done, result in enumerate(results, start=1):
        failed += result.error is not None
        if options.format == "jsonl":
            told = {"error": result.error} if result.error is not None else {"caption": result.text}
            print(json.dumps({"image": result.image, **told}, ensure_ascii=False), file=output, flush=True)
        elif result.error is not None:
            say(f"{result.image}: {result.error}")
        elif options.format == "sidecar":
            _write_sidecar(Path(result.image), result.text)
        else:
            shown = result.text if alone else f"{_one_line(result.image)}\t{_one_line(result.text)}"
            print(shown, file=output, flush=True)
        if not alone:
            rate = done / (time.monotonic() - started)
            progress.show(f"{done:,} of {len(paths):,} images, {rate:.1f} a second", last=done == len(paths))
    if output is not sys.stdout:
        output.close()
    if failed:
        say(f"{failed:,} of {len(paths):,} images could not be captioned.")
        return 1 if failed == len(paths) else 3
    return 0


def _images(given: list[str], recursive: bool) -> Iterator[Path]:
    """Files as they are given, and the images in folders by name; a file need not look like an image."""
    from vlm_lora.data.images import IMAGE_SUFFIXES

    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = path.rglob("*") if recursive else path.iterdir()
            yield from sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.exists():
            yield path
        else:
            raise ConfigError(f"{name}: there is no such file or folder.")


def _without_sidecar(paths: list[Path], overwrite: bool) -> list[Path]:
    texts: dict[Path, Path] = {}
    for path in paths:
        other = texts.setdefault(path.with_suffix(".txt"), path)
        if other != path:
            raise ConfigError(f"{other} and {path} would share one caption file, {path.with_suffix('.txt').name}.")
    left = [path for path in paths if overwrite or not path.with_suffix(".txt").exists()]
    if len(left) < len(paths):
        say(f"{len(paths) - len(left):,} images have a caption already; --overwrite writes them anew.")
    return left


def _write_sidecar(image: Path, text: str) -> None:
    target = image.with_suffix(".txt")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, target)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
