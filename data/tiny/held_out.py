"""What the embedded model sees in pictures it was not trained on, beside what it would score by luck.

    python data/tiny/held_out.py --emoji package [--model tiny]

1,000 scenes with numbers that pretraining never draws: CIDEr-D of the captions against five true ones, and the share of
the things in a picture that its caption names (for shapes, with their colour); the same captions dealt out to other
pictures; and exact match of answers by kind of question. The last line is JSON.
"""

import argparse
import collections
import json
from pathlib import Path

import numpy as np
from pretrain import HELD_OUT
from scenes import ONE_WORD, caption, draw_scene, load_emoji, question

from vlm_lora import Captioner, Decoding, Turn
from vlm_lora.inference.metrics import cider_d

SCENES = 1000
QUESTIONS = 4


def named_share(scene, text: str) -> float:
    return sum(thing.phrase in text for thing in scene.things) / len(scene.things)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    emoji = load_emoji(args.emoji)
    captioner = Captioner.load(args.model)
    scenes, references, said, right = [], [], [], collections.defaultdict(list)
    for number in range(SCENES):
        rng = np.random.default_rng([HELD_OUT + number])
        scene = draw_scene(rng, emoji, emoji_share=0.5)
        asked = [question(scene, rng) for _ in range(QUESTIONS)]
        requests = [(Turn("Describe this image.", ""),), *[(Turn(ask + ONE_WORD, ""),) for ask, _, _ in asked]]
        (answers,) = captioner.generate(
            [(captioner.features.get([scene.image]), requests)], decoding=Decoding(max_new_tokens=48)
        )
        scenes.append(scene)
        references.append([caption(scene, rng) for _ in range(5)])
        said.append(answers[0])
        for (ask, _, word), answer in zip(asked, answers[1:], strict=True):
            kind = "yes/no" if word in ("yes", "no") else " ".join(ask.split()[:2]).lower()
            right[kind].append(answer == word)
    dealt = said[1:] + said[:1]
    record = {
        "scenes": SCENES,
        "cider_d": float(np.mean(cider_d(said, references))),
        "cider_d_shuffled": float(np.mean(cider_d(dealt, references))),
        "things_named": float(np.mean([named_share(s, t) for s, t in zip(scenes, said, strict=True)])),
        "things_named_shuffled": float(np.mean([named_share(s, t) for s, t in zip(scenes, dealt, strict=True)])),
        "one_word_answers": {kind: [float(np.mean(v)), len(v)] for kind, v in sorted(right.items())},
    }
    for scene, text in list(zip(scenes, said, strict=True))[:5]:
        print(", ".join(thing.phrase for thing in scene.things), "->", text)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
