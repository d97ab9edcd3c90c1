"""Draw the captioning sample: scenes of two emoji, five captions each in a style of their own, as COCO captions JSON;
and a few more pictures without captions, to try an adapter on.

    npm pack emoji-datasource-google@16.0.0 && tar -xzf emoji-datasource-google-16.0.0.tgz
    python data/emoji_scenes/build.py --emoji package
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny"))
from scenes import Thing, article, draw_scene, load_emoji

NUM_IMAGES, NUM_MORE = 400, 8
FIRST_SEED = 2_000_000_000  # far from the numbers that pretraining draws its scenes with
SIZES = [(64, 64), (96, 64), (80, 80)]
PAIRS = {
    "beside": [
        "{a} with {b} on its right",
        "on the left {a}, on the right {b}",
        "{a} and, a little further right, {b}",
        "{b} keeps {a} company from the right",
        "{a} has {b} for a neighbour on the right",
        "{a} to the left, {b} to the right of it",
    ],
    "over": [
        "{a} high up, {b} underneath",
        "{b} sits below {a}",
        "{a} floats over {b}",
        "at the bottom {b}, with {a} above it",
        "{a} on top and {b} down below",
        "{b} looks up at {a}",
    ],
}


def captions(things: tuple[Thing, ...], rng: np.random.Generator) -> list[str]:
    dx, dy = (abs(things[0].centre[i] - things[1].centre[i]) for i in (0, 1))
    axis, way = (0, "beside") if dx >= dy else (1, "over")
    first, second = sorted(things, key=lambda thing: thing.centre[axis])
    chosen = rng.permutation(PAIRS[way])[:5]
    texts = [str(text).format(a=article(first.name), b=article(second.name)) for text in chosen]
    return [text[0].upper() + text[1:] + "." for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    emoji = load_emoji(args.emoji)
    for folder in ("images", "more"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    images, annotations, seed = [], [], FIRST_SEED
    drawn = 0
    while drawn < NUM_IMAGES + NUM_MORE:
        rng = np.random.default_rng(seed)
        seed += 1
        scene = draw_scene(rng, emoji, SIZES[drawn % 3], emoji_share=1.0, counts=(0.0, 1.0, 0.0))
        if len(scene.things) != 2:
            continue
        drawn = number = drawn + 1
        name = f"{number:04}.png"
        folder = "images" if number <= NUM_IMAGES else "more"
        scene.image.quantize(128).save(args.out / folder / name, optimize=True)
        if folder == "more":
            continue
        images.append({"id": number, "file_name": name, "width": scene.image.width, "height": scene.image.height})
        for text in captions(scene.things, rng):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
    document = {"info": {"description": "emoji scenes of vlm-lora"}, "images": images, "annotations": annotations}
    (args.out / "captions.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"{len(images)} images, {len(annotations)} captions")


if __name__ == "__main__":
    main()
