"""Prompt tuning (arXiv:2104.08691): trained vectors stand as tokens at the start of every sequence.

They are tokens -1, -2, ... to everything that works on tokens: the first ones of each prefix, so that
branches share them, text positions and masks come out as for any other token, and the image's tokens come
after them. Only the embedding knows that their vectors are trained. They start as the embeddings of words
drawn from the vocabulary. Saved is ``model.language_model.embed_tokens.prompt`` ``(num_virtual_tokens,
hidden)``; the settings are ``{"method": "prompt", "num_virtual_tokens": ...}``.
"""

import torch
from torch import nn

from vlm_lora.model.backbone import Backbone


class PromptedEmbedding(nn.Module):
    """The base's embedding, and trained vectors for the tokens below zero: token -1 is the first."""

    def __init__(self, base: nn.Embedding, prompt: torch.Tensor):
        super().__init__()
        self.base = base
        # Float32 or better: bfloat16 would swallow small updates.
        self.prompt = nn.Parameter(prompt.to(torch.promote_types(prompt.dtype, torch.float32), copy=True))
        self.on = True

    @property
    def num_prompt_tokens(self) -> int:
        """Of all that is encoded from here on."""
        return len(self.prompt) if self.on else 0

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


@torch.no_grad()
def add_prompt(backbone: Backbone, count: int, seed: int) -> list[nn.Module]:
    """Put ``count`` trained vectors before everything; their first values come from ``seed``. The module that is
    new."""
    base = backbone.language_model.embed_tokens
    backbone.language_model.embed_tokens = PromptedEmbedding(base, base(some_words(backbone, count, seed)))
    return [backbone.language_model.embed_tokens]
