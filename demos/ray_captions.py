"""Captions of a folder of images on many GPUs, by Ray Data: see docs/serving.md.

python demos/ray_captions.py images captions --adapter runs/photos --workers 8
"""

import argparse
from pathlib import Path

import numpy as np

from vlm_lora import Captioner, Decoding
from vlm_lora.data.readers.folders import images_below


class Captions:
    """What each of Ray's workers keeps: one loaded model. Called with batches of rows, it adds their captions."""

    def __init__(self, adapter: str | None, model: str | None = None, max_new_tokens: int = 64):
        self.captioner = Captioner.load(model, adapter)
        self.decoding = Decoding(max_new_tokens=max_new_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        captions = list(self.captioner.caption([str(name) for name in batch["image"]], decoding=self.decoding))
        texts = {"caption": [c.text or "" for c in captions], "error": [c.error or "" for c in captions]}
        return batch | {name: np.array(column, dtype=object) for name, column in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Captions of a folder of images on many GPUs, by Ray Data.")
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path, help="folder for the JSON lines")
    parser.add_argument("--adapter")
    parser.add_argument("--model")
    parser.add_argument("--workers", type=int, default=1, help="copies of the model, a GPU each")
    parser.add_argument("--gpus", type=float, default=1.0, help="GPUs of a worker; 0 runs on CPUs")
    options = parser.parse_args()
    import ray.data  # pyright: ignore[reportMissingImports]  # who runs this has Ray; the tests have not

    names = [str(path.absolute()) for path in images_below(options.images)]
    rows = ray.data.from_items([{"image": name} for name in names])
    captioned = rows.map_batches(
        Captions,
        fn_constructor_kwargs={"adapter": options.adapter, "model": options.model},
        batch_size=256,
        num_gpus=options.gpus,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
    )
    captioned.write_json(str(options.output.absolute()))


if __name__ == "__main__":
    main()
