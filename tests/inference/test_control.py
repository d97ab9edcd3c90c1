"""What was asked of a caption holds: by its effect on `tiny`, in a batch as alone, and equal to transformers' own."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tests.conftest import ROOT, picture
from vlm_lora.config import DEFAULT_PROMPT, TrainConfig
from vlm_lora.errors import ConfigError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.control import TextControl
from vlm_lora.inference.wording import first_words, num_words, says, whole_sentences, without_loop
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.features import FeatureCache

SCENES = sorted((ROOT / "data/emoji_scenes/more").glob("*.png"))[:6]


@pytest.fixture(scope="module")
def tiny() -> Captioner:
    return Captioner.load("tiny")


@pytest.fixture(scope="module")
def loud(checkpoints) -> Captioner:
    """Random weights: it says anything, in pieces of words and of characters."""
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    adapter = attach_adapter(backbone, TrainConfig(data="none", rank=4, seed=1))
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data = torch.randn_like(parameter.data) * 0.3
    return Captioner(backbone, adapter, FeatureCache(backbone, None), DEFAULT_PROMPT)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(64, 64), (96, 48), (32, 80), (64, 32)]):
        picture(i, size).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def said(captioner, files, **how) -> list[str]:
    captions = list(captioner.caption(files, decoding=Decoding(**how)))
    assert not [caption.error for caption in captions if caption.error]
    return [caption.text for caption in captions]


CONTROLS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram": 2, "words": (12, 20)},
    {"begin_with": "In this picture "},
    {"avoid": ("picture", "a tree", "è", "猫", "foreach", "think")},
    {"words": (0, 2), "whole_sentences": True, "begin_with": "Look! Here"},
    {"words": (15, 18), "cut_loops": True, "max_new_tokens": 40},
    {"temperature": 1.2, "top_k": 5, "begin_with": "Here"},
    {"temperature": 1.2, "min_p": 0.1, "top_p": 0.9, "repetition_penalty": 1.2},
    {"require": ("middle",), "attempts": 6},
    {"num_beams": 3, "avoid": ("picture",), "words": (3, 9), "begin_with": "Here "},
]


@pytest.mark.parametrize("who", ["tiny", "loud"])
@pytest.mark.parametrize("how", CONTROLS, ids=lambda how: "-".join(how))
def test_batched_equals_alone(who, how, files, request):
    captioner, how = request.getfixturevalue(who), Decoding(**{"max_new_tokens": 24} | how)
    pictures = SCENES if who == "tiny" else files
    batched = list(captioner.caption(pictures, batch_size=len(pictures), decoding=how))
    assert batched == [next(captioner.caption([each], batch_size=1, decoding=how)) for each in pictures]
    plain = Decoding(max_new_tokens=24)
    assert batched != list(captioner.caption(pictures, decoding=plain))  # or the control did nothing


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram"])
def test_penalties_equal_those_of_generate(loud, files, name, beams):
    def stock(file: Path) -> str:
        processor = loud.backbone.processor
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.open(file).convert("RGB")], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        ngrams = NoRepeatNGramLogitsProcessor(1)
        theirs = {
            "repetition_penalty": RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=length),
            "no_repeat_ngram": lambda ids, scores: ngrams(ids[:, length:], scores),  # it has no such argument
        }
        tokens = loud.backbone.model.generate(
            **inputs, max_new_tokens=12, do_sample=False, num_beams=beams, logits_processor=[theirs[name]]
        )[0, length:]
        ends = loud.backbone.eos_token_ids
        return processor.decode([t for t in tokens.tolist() if t not in ends], skip_special_tokens=True).strip()

    how = Decoding(max_new_tokens=12, num_beams=beams, **{name: 1.3 if name == "repetition_penalty" else 1})
    ours = [loud.answer(file, "What?", decoding=how) for file in files]
    assert ours == [stock(file) for file in files]
    assert ours != [loud.answer(file, "What?", decoding=Decoding(max_new_tokens=12, num_beams=beams)) for file in files]


WORDS = ("a", "cat", "the picture", "tree", "é", "naïve", "猫", "不要", "rock'n'roll", "!", "🦊", "red-brown")
TEXTS = (
    "",
    "a",
    "A photo of th",
    "the pic",
    "THE PICTURE",
    "It is a c",
    "na",
    "nai\u0308v",
    "小",
    "不",
    "rock'n",
    "red-",
)


def test_the_tokens_that_are_forbidden_are_those_that_would_say_it(tiny):
    """Of all tokens of the vocabulary, against reading the text with each one added; also within a character."""
    tokenizer = tiny.backbone.tokenizer
    control = TextControl(tokenizer, [0], Decoding(avoid=WORDS))
    fox, cat = (tokenizer(text)["input_ids"] for text in ("🦊", "猫"))
    assert len(fox) > 1
    assert len(cat) > 1
    starts = [tokenizer(text)["input_ids"] for text in TEXTS] + [fox[:-1], cat[:-1], cat[:1]]
    special = set(tokenizer.all_special_ids)
    caught = 0
    for start in starts:
        text = tokenizer.decode(start)
        if says(text, WORDS):
            continue  # it has been said, and nothing more can be asked
        forbidden = {token for tokens in control._forbidden(start, text) for token in tokens}
        said = {
            token
            for token in range(len(tokenizer))
            if token not in special and says(tokenizer.decode([*start, token]), WORDS)
        }
        assert forbidden == said, text
        caught += len(said)
    assert caught > 100


def test_what_is_avoided_is_never_said(loud, tiny, files):
    plain = said(tiny, SCENES)
    assert any(says(text, ["picture"]) for text in plain)
    for avoid in (("picture",), ("PICTURE", "Image"), ("shows a", "photo")):
        assert not any(says(text, avoid) for text in said(tiny, SCENES, avoid=avoid))
    wild = [text for seed in range(4) for text in said(loud, files, temperature=2.0, seed=seed)]
    letters = tuple("abcdefghij")  # as words of their own, which random tokens often make
    assert any(says(text, letters) for text in wild)
    tamed = [text for seed in range(4) for text in said(loud, files, temperature=2.0, seed=seed, avoid=letters)]
    assert not any(says(text, letters) for text in tamed)


def test_the_caption_goes_on_from_its_beginning(tiny):
    for begin in ("A photo of ", "In the pic", "A photo of"):
        captions = said(tiny, SCENES, begin_with=begin)
        assert all(text.startswith(begin) and len(text) > len(begin) + 3 for text in captions)
    assert len(set(captions)) > 3
    streamed = list(tiny.stream(SCENES[0], decoding=Decoding(begin_with="A photo of ")))
    assert streamed[-1] == said(tiny, SCENES[:1], begin_with="A photo of ")[0]


def test_the_number_of_words_is_kept(tiny):
    captions = said(tiny, SCENES, words=(12, 15))
    assert all(12 <= num_words(text) <= 15 for text in captions)
    assert all(num_words(text) <= 3 for text in said(tiny, SCENES, words=(0, 3)))
    assert any(num_words(text) > 3 for text in said(tiny, SCENES))
    (short,) = tiny.caption(SCENES[:1], decoding=Decoding(words=(12, 15), max_new_tokens=4, attempts=0))
    assert short.error
    assert short.error.endswith("has 3 words; --words asks for 12 to 15, --max-new-tokens is 4")


def test_a_limit_leaves_whole_sentences(tiny):
    for limit in ({"max_new_tokens": 2}, {"words": (0, 5)}):
        cut = said(tiny, SCENES, begin_with="Look at it. The", **limit)
        wanted = [text if text.endswith(".") else "Look at it." for text in cut]
        assert "Look at it." in wanted
        assert said(tiny, SCENES, begin_with="Look at it. The", **limit, whole_sentences=True) == wanted
        nothing_whole = said(tiny, SCENES, **limit, whole_sentences=True)
        assert nothing_whole == said(tiny, SCENES, **limit)
    assert said(tiny, SCENES, whole_sentences=True) == said(tiny, SCENES)  # where no limit cut anything off


def test_a_loop_is_cut(tiny, monkeypatch):
    """A model that says its own words again and again: its logits are those of the token two before."""
    tokens = iter(range(10**6))
    cat = tiny.backbone.tokenizer(" a cat,")["input_ids"]

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*hidden.shape[:-1], len(tiny.backbone.tokenizer))
        scores[..., cat[next(tokens) % len(cat)]] = 1.0
        return scores

    monkeypatch.setattr(tiny.backbone, "logits", logits)
    long = said(tiny, SCENES[:1], begin_with="Here is")[0]
    assert long.count("cat") > 5
    tokens = iter(range(10**6))
    assert said(tiny, SCENES[:1], begin_with="Here is", cut_loops=True) == ["Here is a cat"]
    assert next(tokens) < 20  # and no more was decoded


def test_what_is_required_is_tried_again_and_then_reported(tiny):
    plain, how = said(tiny, SCENES), Decoding(require=("left",), attempts=20)
    captions = list(tiny.caption(SCENES, decoding=how))
    found = [caption.text for caption in captions if caption.text]
    assert all("left" in text for text in found)
    assert len(found) > sum("left" in text for text in plain)
    for caption in captions:
        assert caption.text or caption.error.endswith("the last of 21 tried, does not say 'left'")
    assert captions == list(tiny.caption(SCENES, decoding=how))


def test_controls_that_do_not_go_together():
    for fields, message in (
        ({"avoid": ("",)}, "--avoid"),
        ({"require": (" ",)}, "--require"),
        ({"min_p": 0.5}, "--min-p is about what is drawn"),
        ({"min_p": 2.0, "temperature": 1.0}, "--min-p is 2.0; expected a share from 0 to 1"),
        ({"attempts": -1}, "--attempts is -1"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram is -1"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"words": (0, 0)}, "--words is 0..0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Decoding(**fields)


def test_whole_words_in_any_spelling():
    assert says("A Photo  of\na CAT’s house, nai\u0308ve catalog", ["cat", "photo of", "cat's", "naïve"]) == [
        "cat", "photo of", "cat's", "naïve",
    ]  # fmt: skip
    assert not says("A catalog, concatenated; cats", ["cat"])
    assert says("小猫坐", ["猫"]) == ["猫"]
    assert says("wow!", ["!"]) == ["!"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("There is a cat, a cat, a cat, a cat, a cat", "There is a cat"),
        ("very very very good", "very very very good"),
        ("no no no no no no no no no", "no"),
        ("A dog runs. A dog runs. A dog runs. A", "A dog runs."),
        ("One, two, one, two, three", "One, two, one, two, three"),
        ("A cat. Then: la la la la la la la la la, the end", "A cat. Then: la"),
    ],
)
def test_loops_are_recognised(text, cut):
    assert without_loop(text) == cut


def test_a_loop_is_found_at_any_period_and_place():
    for seed in range(200):
        drawn = random.Random(seed)
        words = [f"w{i}" for i in range(60)]
        drawn.shuffle(words)
        start, period = drawn.randrange(1, 15), drawn.randrange(3, 20)
        text = " ".join(words[:start] + 4 * words[start : start + period])
        assert without_loop(text) == " ".join(words[: start + period])
        assert without_loop(" ".join(words)) == " ".join(words)


def test_sentences_and_words_are_cut_at_their_ends():
    assert whole_sentences("A cat sits. It is 3.5 m tall. Then Mr. Smith") == "A cat sits. It is 3.5 m tall."
    assert whole_sentences('He says "stop!" and goe') == 'He says "stop!"'
    assert whole_sentences("no end at all") == "no end at all"
    assert whole_sentences("猫。犬が") == "猫。"
    assert first_words("A red-brown cat sits. It", 4) == "A red-brown cat sits."
    assert first_words("A red-brown cat sits. It", 9) == "A red-brown cat sits. It"
    assert num_words("A red-brown cat's 猫猫, it!") == 6
