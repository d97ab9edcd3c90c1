"""Answers under every method: a batch, shared prefixes and one by one agree with a decoding that keeps no
cache.
"""

import pytest
import torch

from tests.conftest import picture
from tests.model.test_methods import LOGITS, METHODS, attach
from vlm_lora.config import DEFAULT_PROMPT, TrainConfig
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.errors import AdapterError
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.model.adapters.base import ADAPTED
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.features import FeatureCache

QUESTIONS = ["What is it?", "Describe this image, please, in very many words."]
SHORT = Decoding(max_new_tokens=8)
PICTURES = [picture(i, size) for i, size in enumerate([(64, 64), (96, 48), (32, 80)])]


def logits_by_hand(captioner, method: str, image, question: str):
    """A function that gives, for the answer's tokens so far, the logits of the next one ``(vocabulary,)``: from the
    whole sequence again, with positions and mask written out."""
    backbone, processor = captioner.backbone, captioner.backbone.processor
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
    options = backbone.family.template_options
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, **options)
    inputs = processor(text=[text], images=[image] if image else None, return_tensors="pt")
    pixels, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    tensors = [p for _, p in captioner.adapter.named_parameters()]

    def logits(answer: list[int]) -> torch.Tensor:
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
        if method in LOGITS:
            with captioner.adapter.switched_off():
                return LOGITS[method](backbone, *tensors, ids, pixels, grid)[0, -1]
        kinds = (ids == backbone.image_token_id).int()
        more = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds} if image else {}
        return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, -1]

    return logits


def said_by_hand(captioner, method: str, image, question: str) -> str:
    answer, logits = [], logits_by_hand(captioner, method, image, question)
    while len(answer) < SHORT.max_new_tokens:
        token = int(logits(answer).argmax())
        if token in captioner.backbone.eos_token_ids:
            break
        answer.append(token)
    return captioner.encoder.decode(answer)


def searched_by_hand(captioner, method: str, image, question: str, width: int, length: int) -> str:
    """Beam search by its definition: of all answers that grow out of the ``width`` likeliest, the one with the highest
    mean log-probability a token, its end among them."""
    ends, logits = captioner.backbone.eos_token_ids, logits_by_hand(captioner, method, image, question)
    growing, ended = [(0.0, [])], []
    for size in range(1, length + 1):
        grown = [
            (total + share, [*answer, token])
            for total, answer in growing
            for token, share in enumerate(logits(answer).log_softmax(-1).tolist())
        ]
        grown.sort(key=lambda each: -each[0])
        over = [(total / size, answer) for total, answer in grown[:width] if answer[-1] in ends or size == length]
        ended = sorted([*ended, *over], key=lambda each: -each[0])[:width]
        growing = [(total, answer) for total, answer in grown if answer[-1] not in ends][:width]
        if len(ended) == width and growing[0][0] / size <= ended[-1][0]:
            break
    return captioner.encoder.decode([token for token in ended[0][1] if token not in ends])


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *[(method, "qwen2_vl") for method in METHODS],
        *[(method, "qwen2_5_vl") for method in ("vision too", "adapter", "prompt", "prefix")],
        *[(method, "qwen3_vl") for method in METHODS],
        *[(method, "qwen3_5") for method in METHODS if method != "prefix"],
    ],
)
def test_batched_shared_and_single_equal_decoding_by_hand(checkpoints, monkeypatch, method, family):
    backbone, adapter = attach(checkpoints, method, family, dtype=torch.float32)
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
    bare = Captioner.load(str(checkpoints[family]))
    assert off == [bare.answer(image, QUESTIONS, decoding=SHORT) for image in PICTURES]
    assert off != batched[:3]


@pytest.mark.parametrize("method", ["prompt", "prefix", "adapter"])
def test_beams_of_every_method_equal_a_search_by_hand(checkpoints, monkeypatch, method):
    """LoRA's are held against transformers' own in test_captioner."""
    backbone, adapter = attach(checkpoints, method, "qwen2_vl", dtype=torch.float32)
    backbone.model.eval()
    captioner = Captioner(backbone, adapter, FeatureCache(backbone, None), DEFAULT_PROMPT)
    with torch.inference_mode():
        first = said_by_hand(captioner, method, PICTURES[0], QUESTIONS[0])
        early = backbone.tokenizer(first)["input_ids"][2:3]  # so that answers end before their time
        ends = backbone.eos_token_ids | {backbone.image_token_id, *early}
        monkeypatch.setattr(type(backbone), "eos_token_ids", ends)
        wanted = [[searched_by_hand(captioner, method, p, q, width=4, length=6) for q in QUESTIONS] for p in PICTURES]
    how = Decoding(max_new_tokens=6, num_beams=4)
    asked = [(captioner.features.get([p]), asking(*QUESTIONS)) for p in PICTURES]
    assert captioner.generate(asked, decoding=how) == wanted
    assert [[captioner.answer(p, q, decoding=how) for q in QUESTIONS] for p in PICTURES] == wanted
    assert wanted != captioner.generate(asked, decoding=Decoding(max_new_tokens=6))  # greedy would pass otherwise


def asking(*questions: str) -> list[tuple[Turn]]:
    return [Dialogue((Turn(question, ""),)) for question in questions]


def test_adapters_of_all_methods_share_one_base(checkpoints, tmp_path):
    """Each says what it says on a base of its own, whatever else is attached beside it; the weights are there once."""
    for method in METHODS:
        attach(checkpoints, method, dtype=torch.float32)[1].save(tmp_path / method)

    def say(captioner: Captioner, **how) -> list[str]:
        return [captioner.answer(picture, QUESTIONS[0], decoding=SHORT, **how) for picture in PICTURES]

    model = str(checkpoints["qwen2_vl"])
    base = Captioner.load(model, dtype="float32")
    alone = {method: say(Captioner.load(model, tmp_path / method, dtype="float32")) for method in METHODS}
    unchanged = say(base)
    first = Captioner.load(model, tmp_path / next(iter(METHODS)), dtype="float32")
    together = {method: first.with_adapter(tmp_path / method) for method in METHODS}
    for method, captioner in together.items():
        assert say(captioner) == alone[method], method
        assert say(captioner, tuned=False) == unchanged, method
    assert say(first) == alone[next(iter(METHODS))]
    assert len({str(texts) for texts in alone.values()}) > 3  # else nothing is shown by being equal
    tensors = {weight.data_ptr() for weight in first.base.backbone.model.parameters()}
    for method, captioner in together.items():
        frozen = [p for n, p in captioner.backbone.model.named_parameters() if not ADAPTED.search(n)]
        assert {weight.data_ptr() for weight in frozen} == tensors, method


def test_an_adapter_of_another_base_leaves_the_base_as_it_was(checkpoints, tmp_path):
    attach(checkpoints, "lora", dtype=torch.float32)[1].save(tmp_path / "adapter")
    other = Captioner.load("tiny")
    before = other.answer(PICTURES[0], QUESTIONS[0], decoding=SHORT)
    with pytest.raises(AdapterError, match="another base model"):
        other.with_adapter(tmp_path / "adapter")
    assert other.answer(PICTURES[0], QUESTIONS[0], decoding=SHORT) == before


def test_another_adapter_brings_its_own_prompt_and_pixel_limits(checkpoints, tmp_path):
    model = str(checkpoints["qwen2_vl"])
    for name, limit in (("small", 48 * 48), ("large", 96 * 96)):
        backbone = load_backbone(model, max_pixels=limit)
        config = TrainConfig(data="none", rank=4, seed=1, prompt=f"Prompt {name}.")
        attach_adapter(backbone, config).save(tmp_path / name)
    small = Captioner.load(model, tmp_path / "small")
    large = small.with_adapter(tmp_path / "large")
    assert (small.prompt, large.prompt) == ("Prompt small.", "Prompt large.")
    assert (small.backbone.pixel_limits[1], large.backbone.pixel_limits[1]) == (48 * 48, 96 * 96)
    picture_96 = picture(7, (96, 96))
    assert len(small.features.get([picture_96])[0].values) < len(large.features.get([picture_96])[0].values)
    assert small.with_adapter(tmp_path / "small").features is small.features  # seen once for both
