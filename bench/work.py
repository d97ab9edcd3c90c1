"""The work that `bench.speed` gives to every tool: a checkpoint with random weights, pictures, texts.

The checkpoint has the on-disk layout of Qwen2-VL, so any tool loads it; its text is that of the embedded model's
tokenizer. Seeds are fixed: the same arguments make the same bytes.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.model.folder import tiny_path

PATCH = 14

SHAPES = {
    # Vision : language : head cost what they cost, in proportion, in Qwen2-VL-2B.
    "small": {"depth": 12, "width": 384, "hidden": 512, "layers": 8, "inner": 3072, "vocabulary": 16384},
    "smoke": {"depth": 2, "width": 32, "hidden": 64, "layers": 2, "inner": 128, "vocabulary": 4224},  # for a test
}
HEAD = {"small": 64, "smoke": 16}


def write_checkpoint(folder: Path, shape: str) -> None:
    """A Qwen2-VL of random weights, its processor, and a chat template that ends with the last turn's own end."""
    from transformers import (
        AutoTokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    size, head = SHAPES[shape], HEAD[shape]
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.chat_template = ending_with_its_turn(tokenizer.chat_template)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": size["depth"], "embed_dim": size["width"], "num_heads": size["width"] // head, "mlp_ratio": 4,
            "patch_size": PATCH, "hidden_size": size["hidden"],
        },
        text_config={
            "vocab_size": size["vocabulary"], "hidden_size": size["hidden"], "intermediate_size": size["inner"],
            "num_hidden_layers": size["layers"], "num_attention_heads": size["hidden"] // head,
            "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    limits = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 28 * 28}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=PATCH, size=limits),
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, size=limits),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def ending_with_its_turn(template: str) -> str:
    """The embedded model's chat template without the line break behind the last turn: the tools differ in whether they
    learn it."""
    end, newline = "{{- '<|im_end|>' -}}", "{%- if not loop.last or add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}"
    changed = template.replace("{{- '<|im_end|>\\n' -}}", end + newline)
    assert changed != template, "the embedded model's chat template is not as it was"
    return changed


# Words that are one token each here, as most are to the tokenizer of the big models.
TEXT = """
a the red old small large black light man child people family table window house car book water city school field
near under with on in of and its two three several looking night day"""
WORDS = TEXT.split()


def write_data(folder: Path, *, images: int, said: str, tokens: int) -> Path:
    """JPEG pictures of ``tokens`` image tokens each, and `data.jsonl` with what is ``said`` of each.

    ``said`` is such as "5 captions" (about 14 tokens each) or "10 questions" (about 10 tokens, and 2 of answer).
    """
    side = round(tokens**0.5)
    assert side * side == tokens, "a square picture has a square number of tokens"
    count, kind = said.split()
    (folder / "images").mkdir(parents=True)
    noise, draw = np.random.default_rng(0), random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = []
    for number in range(images):
        name = f"images/{number:05}.jpg"
        coarse = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((2 * PATCH * side, 2 * PATCH * side), Image.Resampling.BICUBIC)
        picture.save(folder / name, quality=90)
        for _ in range(int(count)):
            if kind.startswith("caption"):
                rows.append({"image": name, "question": DEFAULT_PROMPT, "answer": words(9, 13).capitalize() + "."})
            else:
                rows.append({"image": name, "question": words(5, 9).capitalize() + "?", "answer": words(1, 2)})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
