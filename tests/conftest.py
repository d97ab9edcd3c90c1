"""Small checkpoints in the exact layout of the big ones, and pictures."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny" / "model"

VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8, "hidden_size": 48},
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8, "out_hidden_size": 48,
        "window_size": 32, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8, "out_hidden_size": 48,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1],
    },
    "qwen3_5": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8, "out_hidden_size": 48,
        "num_position_embeddings": 36,
    },
}  # fmt: skip
TEXT = {  # what differs from the others'
    "qwen3_vl": {
        "num_hidden_layers": 3,  # behind the last one nothing would look at what the tower shows
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "qwen3_5": {
        "num_hidden_layers": 4,  # three of linear attention, and one that sees all
        "head_dim": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
        },
    },
}  # fmt: skip
THINKING = r"""
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for part in m.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n<think>\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
"""What the templates of Qwen3.5 do; this one's of the sizes that think unless they are told not to. A server looks at
the loop to know whether a message may have parts."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's feature cache."""
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_checkpoint(
    folder: Path,
    family: str,
    tokenizer_folder: Path = TINY,
    *,
    vision: dict | None = None,
    text: dict | None = None,
    pixels: tuple[int, int] = (32 * 32, 96 * 96),
) -> Path:
    """A random checkpoint of ``family``, a few ten thousand parameters beside its embeddings.

    ``vision`` and ``text`` are sizes in the place of these; ``pixels`` the limits of its processor.
    """
    import torch
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    classes = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
        "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3VLProcessor),
    }
    config_class, model_class, processor_class = classes[family]
    video_processor_class = Qwen3VLVideoProcessor if family.startswith("qwen3") else Qwen2VLVideoProcessor
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer.convert_tokens_to_ids
    vision = VISION[family] | {"initializer_range": 0.2} | (vision or {})
    config = config_class(
        vision_config=vision,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        } | TEXT.get(family, {}) | (text or {}),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # remembers for hundreds of tokens, as published weights do
                parameter.data.uniform_(-6, 0)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    patch = vision["patch_size"]
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, size=size),
        video_processor=video_processor_class(patch_size=patch, size=size),
        tokenizer=tokenizer,
        chat_template=THINKING if family == "qwen3_5" else tokenizer.chat_template,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folder by family."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(base / family, family) for family in VISION}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Coloured blobs, so that no two patches are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photo_folder(tmp_path) -> Path:
    """Twelve pictures with sidecar captions, as people have them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        picture(i, (64 + 16 * (i % 3), 64)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"A picture of number {i}.\n", encoding="utf-8")
    return folder


def copy_checkpoint(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


LONGEST = ("readme", "processes", "plan", "train", "cli", "demo_browser", "hub", "exactness", "survival", "compiled")
"""Files of tests that take a minute or more."""


def pytest_collection_modifyitems(items):
    """They come first: else the last of them runs alone at the end, and the other cores wait."""
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem[5:]) in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, or Playwright's own. Without one these tests are skipped, and `make test` says which."""
    playwright = pytest.importorskip("playwright.sync_api")
    named = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    with playwright.sync_playwright() as started:
        found = next(filter(None, named), None) or started.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("No Chromium on this machine: playwright install chromium")
        # Without the sandbox, which a container has no rights for; the only pages opened are our own.
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
