"""Answers under every method: a batch, shared prefixes and one by one agree with a decoding that keeps no
cache.
"""

import pytest
import torch

from tests.conftest import picture
from tests.model.test_methods import LOGITS, METHODS, attach
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.data.example import Turn
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.model.features import FeatureCache

QUESTIONS = ["What is it?", "Describe this image, please, in very many words."]
SHORT = Decoding(max_new_tokens=8)
PICTURES = [picture(i, size) for i, size in enumerate([(64, 64), (96, 48), (32, 80)])]


def said_by_hand(captioner, method: str, image, question: str) -> str:
    """The whole sequence again for each token, with positions and mask written out."""
    backbone, processor = captioner.backbone, captioner.backbone.processor
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image] if image else None, return_tensors="pt")
    ids, pixels, grid = inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_grid_thw")
    tensors = [p for _, p in captioner.adapter.named_parameters()]
    said = []
    for _ in range(SHORT.max_new_tokens):
        if method in LOGITS:
            with captioner.adapter.switched_off():
                logits = LOGITS[method](backbone, *tensors, ids, pixels, grid)
        else:
            kinds = (ids == backbone.image_token_id).int()
            more = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
            more = more if image else {}
            logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
        token = logits[:, -1].argmax(-1)
        if token.item() in backbone.eos_token_ids:
            break
        said.append(token.item())
        ids = torch.cat([ids, token[None]], 1)
    return captioner.encoder.decode(said)


@pytest.mark.parametrize("method", METHODS)
def test_batched_shared_and_single_equal_decoding_by_hand(checkpoints, monkeypatch, method):
    backbone, adapter = attach(checkpoints, method, dtype=torch.float32)
    backbone.model.eval()
    # A random model may say "here is an image"; what is written out by hand would look for it.
    ends = backbone.eos_token_ids | {backbone.image_token_id}
    monkeypatch.setattr(type(backbone), "eos_token_ids", ends)
    captioner = Captioner(backbone, adapter, FeatureCache(backbone, None), DEFAULT_PROMPT)
    images = [*PICTURES, None]  # and a question without a picture
    entries = [captioner.features.get([image] if image else []) for image in images]
    with torch.inference_mode():
        wanted = [[said_by_hand(captioner, method, image, q) for q in QUESTIONS] for image in images]
    batched = captioner.generate([(e, asking(*QUESTIONS)) for e in entries], decoding=SHORT)
    shared = [captioner.generate([(e, asking(*QUESTIONS))], decoding=SHORT)[0] for e in entries]
    single = [[captioner.generate([(e, asking(q))], decoding=SHORT)[0][0] for q in QUESTIONS] for e in entries]
    assert wanted == batched == shared == single
    assert len({text for row in wanted for text in row}) > 3  # a model that always says the same would pass too
    off = [captioner.answer(image, QUESTIONS, tuned=False, decoding=SHORT) for image in PICTURES]
    bare = Captioner.load(str(checkpoints["qwen2_vl"]))
    assert off == [bare.answer(image, QUESTIONS, decoding=SHORT) for image in PICTURES]
    assert off != batched[:3]


def asking(*questions: str) -> list[tuple[Turn]]:
    return [(Turn(question, ""),) for question in questions]
