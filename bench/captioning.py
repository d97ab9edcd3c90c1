"""Captioning against the loops people write around transformers' `generate`, on one CPU thread, measured in one run.

    python -m bench.captioning [--repeat 5] [--images 8] [--tokens 24]

The model has the proportions of Qwen2-VL-2B at a fiftieth of its size (vision depth 12 and width 384, 8 language
layers of width 512, inner width 3072, vocabulary 16,384) and random weights: time does not depend on what is said.
Compared by turns, so that a busy machine slows all of them, the ratio of medians counts:

- a folder of images of 64 tokens: one at a time through processor and `generate`; all in one padded batch through the
  same; `Captioner.caption` with nothing cached; the same with the features on disk, as for a second adapter.
- ten questions about one image of 256 tokens: one padded batch of ten; `Captioner.answer` with nothing cached; the same
  with the image's features on disk.

All must say the same words. The record goes to bench/results/captioning.json; the last line of output is the same JSON.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from vlm_lora import Captioner, Decoding, __version__
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.folder import tiny_path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Describe this image."
QUESTIONS = [f"{words} in this picture?" for words in (
    "What is", "Who is", "Where is the dog", "How many people are", "What colour is the house", "Is there a car",
    "What is on the table", "What is behind the tree", "Is it raining", "What is written",
)]  # fmt: skip
TARGETS = {"cold_over_one_at_a_time": 2.4, "cold_over_batched": 1.0, "cached_over_one_at_a_time": 4.0,
           "cached_over_batched": 1.6, "ten_questions_cached_over_batched": 8.0}  # fmt: skip


def write_model(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path())
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 12, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 4, "hidden_size": 512},
        text_config={
            "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.1, "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}
    transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def write_photos(folder: Path, count: int, side: int) -> list[str]:
    rng = np.random.default_rng(side)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (side // 14, side // 14, 3), dtype=np.uint8)
        paths.append(str(folder / f"{side}-{number}.jpg"))
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def by_generate(backbone: Backbone, files: list[str], questions: list[str], tokens: int) -> list[str]:
    """The loop people write: the processor, `generate`, `batch_decode`; one padded batch."""
    processor = backbone.processor
    texts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    images = [Image.open(file).convert("RGB") for file in files]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        said = backbone.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    told = processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a caption")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/captioning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoding = Decoding(max_new_tokens=args.tokens)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_model(place / "model")
        backbone = load_backbone(str(place / "model"), dtype="float32")
        files, (large,) = write_photos(place, args.images, 224), write_photos(place, 1, 448)

        def captioner(cache: Path | None) -> Captioner:
            return Captioner(backbone, None, FeatureCache(backbone, cache), PROMPT)

        def captions(cache: Path | None) -> list[str]:
            told = captioner(cache).caption(files, batch_size=args.images, decoding=decoding)
            return [caption.text for caption in told]

        captions(place / "cache")  # fills it, and hashes the tower: once a process
        several = [PROMPT] * args.images
        works = {
            "one_at_a_time": lambda: [by_generate(backbone, [f], [PROMPT], args.tokens)[0] for f in files],
            "batched": lambda: by_generate(backbone, files, several, args.tokens),
            "cold": lambda: captions(None),
            "cached": lambda: captions(place / "cache"),
            "ten_batched": lambda: by_generate(backbone, [large] * 10, QUESTIONS, args.tokens),
            "ten_questions": lambda: captioner(None).answer(large, QUESTIONS, decoding=decoding),
            "ten_questions_cached": lambda: captioner(place / "cache").answer(large, QUESTIONS, decoding=decoding),
        }
        seconds: dict[str, list[float]] = {work: [] for work in works}
        said: dict[str, list[str]] = {}
        for turn in range(args.repeat + 1):  # the first is to warm up
            for work, do in works.items():
                start = time.process_time()
                said[work] = do()
                if turn:
                    seconds[work].append(time.process_time() - start)
                print(f"turn {turn} of {args.repeat}: {work} {time.process_time() - start:.2f} CPU seconds", flush=True)
    for work in ("batched", "cold", "cached"):
        assert said[work] == said["one_at_a_time"], f"{work} says other words than one at a time"
    for work in ("ten_questions", "ten_questions_cached"):
        assert said[work] == said["ten_batched"], "the ten answers are not the loop's"
    assert len(set(said["cold"])) > 1, "a model that says the same of all images proves nothing"
    median = {work: statistics.median(times) for work, times in seconds.items()}
    ratios = {
        "cold_over_one_at_a_time": median["one_at_a_time"] / median["cold"],
        "cold_over_batched": median["batched"] / median["cold"],
        "cached_over_one_at_a_time": median["one_at_a_time"] / median["cached"],
        "cached_over_batched": median["batched"] / median["cached"],
        "ten_questions_over_batched": median["ten_batched"] / median["ten_questions"],
        "ten_questions_cached_over_batched": median["ten_batched"] / median["ten_questions_cached"],
    }
    for name, ratio in ratios.items():
        wanted = f"   (wanted: {TARGETS[name]}x or more)" if name in TARGETS else ""
        print(f"{name.replace('_', ' '):<34}{ratio:6.2f}x{wanted}")
    record = {
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "targets": TARGETS,
        "median_cpu_seconds": {work: round(value, 3) for work, value in median.items()},
        "same_words": True,
        "images": args.images,
        "new_tokens": args.tokens,
        "repeat": args.repeat,
        "machine": platform.machine(),
        "versions": {
            "vlm_lora": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
