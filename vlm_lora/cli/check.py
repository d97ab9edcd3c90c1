"""Say what is in this data and what is wrong with it, without training.

  vlm-lora check ./photos
  vlm-lora check ./photos --json
"""

import argparse
import json
from collections import Counter

from vlm_lora.cli.console import Progress
from vlm_lora.config import DEFAULT_PROMPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder or file with images and captions, or questions and answers")
    parser.add_argument("--format", metavar="TEXT", help="format of the data (default: found out by looking)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="the instruction that a caption answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.data.images import load_image
    from vlm_lora.data.readers import BadRow, read_dataset
    from vlm_lora.errors import DataError

    dataset = read_dataset(options.data, format=options.format, prompt=options.prompt)
    bad, sizes, progress = list(dataset.bad), [], Progress()
    for done, example in enumerate(dataset.examples, start=1):
        for image in example.images:
            try:
                sizes.append(load_image(image).size)
            except DataError as error:
                bad += [BadRow(example.source, None, str(error)) for _ in example.dialogues]
        progress.count("Images read:", done, len(dataset.examples))
    answers = sum(len(example.dialogues) for example in dataset.examples)
    if options.json:
        rows = [{"source": row.source, "line": row.line, "reason": row.reason} for row in bad]
        told = {"format": dataset.format, "examples": len(dataset.examples), "images": len(sizes), "answers": answers}
        print(json.dumps({**told, "bad": rows}, ensure_ascii=False))
    else:
        print(f"{dataset.format}: {len(dataset.examples):,} examples, {len(sizes):,} images, {answers:,} answers")
        if sizes:
            areas = sorted(width * height for width, height in sizes)
            print(f"image area: {areas[0]:,} to {areas[-1]:,} pixels, half of them below {areas[len(areas) // 2]:,}")
        said = Counter(d.turns[-1].assistant for example in dataset.examples for d in example.dialogues)
        for text, times in said.most_common(5):
            if times > 1:
                print(f"{times:,} times: {text}")
        for row in bad:
            print(f"bad: {row.source}{f':{row.line}' if row.line else ''}: {row.reason}")
    return 1 if bad else 0
