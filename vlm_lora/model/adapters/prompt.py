"""Prompt tuning (arXiv:2104.08691): trained vectors stand as tokens at the start of every sequence.

They are tokens -1, -2, ... to everything that works on tokens: the first ones of each prefix, so that
branches share them, text positions and masks fall out as for any other token, and the image's tokens come
behind them. Only the embedding knows that their vectors are trained. They start as the embeddings of words
drawn from the vocabulary. Saved is ``model.language_model.embed_tokens.prompt`` ``(num_virtual_tokens,
hidden)``; the settings are ``{"method": "prompt", "num_virtual_tokens": ...}``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vlm_lora.model.adapters.base import (
    Adapter,
    Contract,
    check_contract,
    new_contract,
    read_settings,
    read_tensors,
    size_in,
    write_tensors,
)
from vlm_lora.model.backbone import Backbone


class PromptedEmbedding(nn.Module):
    """The base's embedding, and trained vectors for the tokens below zero: token -1 is the first."""

    def __init__(self, base: nn.Module, prompt: torch.Tensor):
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(prompt)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        vectors = self.base(input_ids.clamp(min=0))
        trained = self.prompt.to(vectors.dtype)[(-1 - input_ids).clamp(min=0)]
        return torch.where((input_ids < 0)[..., None], trained, vectors)


def some_words(backbone: Backbone, count: int, seed: int) -> torch.Tensor:
    """``(count,)`` tokens drawn from the vocabulary, none of them a special one."""
    special = {*backbone.tokenizer.all_special_ids, *backbone.tokenizer.get_added_vocab().values()}
    known = min(len(backbone.tokenizer), backbone.language_model.embed_tokens.num_embeddings)
    words = torch.tensor([i for i in range(known) if i not in special])
    draw = torch.Generator().manual_seed(seed)
    return words[torch.randint(len(words), (count,), generator=draw)].to(backbone.device)


def attach_prompt(backbone: Backbone, *, count: int, seed: int, prompt: str) -> Adapter:
    """Freeze the base and put ``count`` trained vectors before everything; their first values come from
    ``seed``.
    """
    with torch.no_grad():
        start = backbone.language_model.embed_tokens(some_words(backbone, count, seed))
    return _attach(backbone, start, new_contract(backbone, "prompt", prompt))


def load_prompt(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved prompt, ready for inference.

    Raises:
        AdapterError: made for another base, or any key is without its counterpart.
    """
    count = size_in(read_settings(folder), "num_virtual_tokens", folder)
    contract = check_contract(backbone, folder)
    width = backbone.language_model.embed_tokens.embedding_dim
    adapter = _attach(backbone, torch.zeros(count, width, device=backbone.device, dtype=backbone.dtype), contract)
    read_tensors(dict(adapter.named_parameters()), folder, backbone.name)
    return adapter


def _attach(backbone: Backbone, start: torch.Tensor, contract: Contract | None) -> Adapter:
    backbone.model.requires_grad_(False)
    count = len(start)
    # Float32 or better: bfloat16 would swallow small updates.
    start = start.detach().to(torch.promote_types(start.dtype, torch.float32), copy=True)
    language_model = backbone.language_model
    language_model.embed_tokens = PromptedEmbedding(language_model.embed_tokens, start)
    backbone.num_prompt_tokens = count
    saved = {n: p for n, p in backbone.model.named_parameters() if p.requires_grad}

    @contextmanager
    def disable() -> Iterator[None]:
        backbone.num_prompt_tokens = 0  # what is encoded meanwhile holds no token below zero
        try:
            yield
        finally:
            backbone.num_prompt_tokens = count

    def write(folder: Path) -> None:
        write_tensors(saved, {"method": "prompt", "num_virtual_tokens": count}, folder)

    return Adapter(backbone, contract, disable, write)
