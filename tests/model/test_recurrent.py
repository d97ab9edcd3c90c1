"""What sharing a prefix saves in Qwen3.5, counted at its published widths; no numbers are computed."""

from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from vlm_lora.model.attention import use_packed_attention
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.families import FAMILIES
from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, pack_apart
from vlm_lora.model.recurrent import linear_attentions, state_bytes


def on_meta(**text) -> Backbone:
    """Shapes alone, of four language layers."""
    config = Qwen3_5Config(
        text_config={"num_hidden_layers": 4, "vocab_size": 1024, **text},
        vision_config={"depth": 1, "out_hidden_size": text["hidden_size"]},
    )
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    use_packed_attention(model)
    model.requires_grad_(False)
    return Backbone(model=model, processor=SimpleNamespace(), name="x", family=FAMILIES["qwen3_5"])


def operations(backbone: Backbone, examples: list[Encoded]) -> int:
    """Of the language layers, forward and backward, with every weight frozen."""
    packed = pack_apart(examples, 0)
    backbone.language_model.embed_tokens.weight.requires_grad = True
    mask, positions = packed.attention_mask.to("meta"), packed.position_ids.to("meta")
    with FlopCounterMode(display=False) as counted:
        backbone.forward(packed.input_ids, mask, positions, None, forks=packed.forks).sum().backward()
    return counted.get_total_flops()


def example(prefix: int, branches: list[int]) -> Encoded:
    def branch(length: int) -> Branch:
        return Branch(torch.ones(length, dtype=torch.long), torch.full((length,), IGNORE_INDEX))

    positions = torch.arange(prefix).expand(3, -1)
    return Encoded(torch.ones(prefix, dtype=torch.long), positions, tuple(map(branch, branches)))


WIDTHS = {  # published
    "0.8B": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    },
    "9B": {"hidden_size": 4096, "intermediate_size": 12288},
}  # fmt: skip


def test_five_captions_share_what_comes_before_them():
    for widths in WIDTHS.values():
        backbone = on_meta(**widths)
        plain = sum(operations(backbone, [example(256, [24])]) for _ in range(5))
        together = operations(backbone, [example(256, [24] * 5)])
        assert 3.5 < plain / together < 5 * 280 / (256 + 5 * 24)


def test_a_long_branch_does_not_make_the_short_ones_long():
    backbone = on_meta(**WIDTHS["0.8B"])
    long, short = (operations(backbone, [example(256, lengths)]) for lengths in ([1000], [24] * 9))
    alone = operations(backbone, [example(256, [2])])
    assert operations(backbone, [example(256, [1000, *[24] * 9])]) < 1.15 * (long + short - alone)


def test_the_states_of_a_sequence_have_their_published_size():
    """18 MiB of 0.8B, 48 of 9B; and the convolution's columns."""
    for name, layers, mebibytes in (("0.8B", 18, 18), ("9B", 24, 48)):
        model = on_meta(**WIDTHS[name]).language_model
        columns = sum(4 * layer.conv_dim * 4 for layer in linear_attentions(model))
        assert (state_bytes(model) - columns) * layers // 3 == mebibytes * 2**20
