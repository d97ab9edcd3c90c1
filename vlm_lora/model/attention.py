"""Attention over packed rows, for transformers' attention interface: no mask of all tokens by all tokens.

A mask ``(B, 1, W, T)`` with fewer rows than there are tokens is that of the last ``W`` of them, the branches. Those
before are the prefix, which is causal by itself and goes through the kernel that needs no mask and computes no upper
half. With a full mask, or none, this is transformers' own SDPA attention.
"""

from typing import Any

import torch
from torch import nn

from vlm_lora.model.families import QwenVL
from vlm_lora.model.recurrent import fork_states

NAME = "vlm_lora_packed"


def use_packed_attention(model: QwenVL) -> None:
    """Have the language layers of a Qwen-VL model attend by `packed_attention`, and those of linear attention fork."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.model.language_model.set_attn_implementation(NAME)
    fork_states(model.model.language_model)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``(B, T, heads, head_dim)`` from queries ``(B, heads, T, head_dim)``, as many keys or more that stand before."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.shape[2] == query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    count = query.shape[2] - attention_mask.shape[2]  # tokens of the prefix
    seen = key.shape[2] - attention_mask.shape[2]  # keys of the prefix, and of what stands before it
    causal = None  # that is, by the kernel; it aligns queries with the first keys
    if seen > count:
        causal = torch.ones(1, 1, count, seen, dtype=torch.bool, device=key.device).tril(seen - count)
    parts = [query[:, :, :count], key[:, :, :seen], value[:, :, :seen], query[:, :, count:]]
    if torch.compiler.is_compiling():
        # Written apart from the start, which costs nothing there. Compiled for any shape, the backward pass expects
        # parts of one tensor as far apart as in the first shape that it has seen.
        parts = [part.contiguous() for part in parts]
    *before, after = parts
    prefix, _ = sdpa_attention_forward(module, *before, causal, **kwargs)
    branches, _ = sdpa_attention_forward(module, after, key, value, attention_mask, **kwargs)
    return torch.cat([prefix, branches], dim=1), None
