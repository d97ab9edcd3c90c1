"""What the loop that users run costs a GPU, counted as vlm-lora's own step is: transformers and PEFT under bfloat16
autocast, with Liger's fused operators and flash attention.

PEFT's LoRA runs as it is, so its conversions are counted and not assumed. A fused operator is one kernel that reads its
inputs and writes its outputs. `ASSUMPTIONS` go into the record.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2_vl import modeling_qwen2_vl as modelling

from vlm_lora.model.families import FAMILIES
from vlm_lora.model.shapes import load_shapes
from vlm_lora.training.trace import MicroShape, Trace, Traced, _FusedAttention, micro_batch, weighted_sum

ASSUMPTIONS = (
    "a row for each answer, all of one length: no padding, attention by one flash call a layer",
    "the base in bfloat16, PEFT's LoRA in float32, without dropout, on the language layers and the merger",
    "autocast converts each float32 weight once a pass, and the input that PEFT has converted to float32 back",
    "Liger's RMSNorm, SwiGLU and M-RoPE: one kernel forward and one backward; RMSNorm without its weight's gradient",
    "logits at the labels alone, their loss and its gradient in one kernel (Liger's computes all rows' logits)",
    "the tower runs forward once an answer, all rows' images together, in bfloat16 also where autocast would not",
    "no optimizer, no loading of data, no launches: what the device computes",
)

_library = torch.library.Library("counted", "DEF")


def _define(schema: str, shapes: Any) -> None:
    """A fused operator that is known by its shapes alone."""
    _library.define(schema)
    _library.impl(schema.split("(")[0], shapes, "Meta")


_define(
    "rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)",
    lambda x, _: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
_define("rms_norm_back(Tensor d, Tensor x, Tensor weight, Tensor r) -> Tensor", lambda d, *_: torch.empty_like(d))
_define("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, _: torch.empty_like(gate))
_define(
    "swiglu_back(Tensor d, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda d, *_: (torch.empty_like(d), torch.empty_like(d)),
)
_define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
)
_define(
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    lambda logits, _: (logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)),
)
counted = torch.ops.counted


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out, root = counted.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, root)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return counted.rms_norm_back(grads[0], *ctx.saved_tensors), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return counted.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return counted.swiglu_back(grads[0], *ctx.saved_tensors)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        ctx.save_for_backward(cos, sin)
        return counted.rope(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *counted.rope(*grads, *ctx.saved_tensors), None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss, of_logits = counted.cross_entropy(hidden @ weight.T, targets)
        ctx.save_for_backward(of_logits @ weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None


class _Autocast(TorchFunctionMode):
    """What `torch.autocast` does to linears; it knows no tensors of shapes alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [a.to(torch.bfloat16) if isinstance(a, torch.Tensor) else a for a in args]
        return func(*args, **(kwargs or {}))


class PlainLoop:
    """Traces of its step, from a model of one and of two language layers."""

    def __init__(self, model: str, layers: int, rank: int):
        self.layers, self.cut = layers, [self._attached(model, count, rank) for count in (1, 2)]

    @staticmethod
    def _attached(model: str, layers: int, rank: int) -> Any:
        backbone = load_shapes(model, dtype=torch.bfloat16, layers=["full_attention"] * layers)
        linears = FAMILIES["qwen2_vl"].linears
        targets = f"(?:{linears['language']})|(?:{linears['projector']})"
        peft = get_peft_model(backbone.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        language = backbone.language_model
        for module in language.modules():
            if isinstance(module, modelling.Qwen2VLRMSNorm):
                module.forward = partial(lambda norm, x: _RMSNorm.apply(x, norm.weight), module)
            if isinstance(module, modelling.Qwen2MLP):
                module.forward = partial(
                    lambda mlp, x: mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x))), module
                )
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        backbone.model.train()
        return backbone

    def step(self, shape: MicroShape) -> Traced:
        """Forward and backward, after the tower."""
        one, two = (self._traced(backbone, shape) for backbone in self.cut)
        return weighted_sum([(2 - self.layers, one), (self.layers - 1, two)])

    def _traced(self, backbone: Any, shape: MicroShape) -> Traced:
        batch = micro_batch(backbone, shape)
        places = (batch.input_ids == backbone.image_token_id).nonzero(as_tuple=True)
        learnt = (batch.labels[:, 1:] >= 0).nonzero(as_tuple=True)
        with ExitStack() as stack:
            trace = stack.enter_context(Trace())
            stack.enter_context(_FusedAttention())
            stack.enter_context(_Autocast())
            stack.enter_context(mock.patch.object(modelling, "apply_rotary_pos_emb", _Rope.apply))
            language, (merger,) = backbone.language_model, backbone.family.mergers_of(backbone.model)
            vectors = language.embed_tokens(batch.input_ids.to(backbone.device))
            vectors = vectors.index_put(tuple(p.to(backbone.device) for p in places), merger(batch.images))
            hidden = language(
                inputs_embeds=vectors,
                attention_mask={"full_attention": None},
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            hidden = hidden[tuple(p.to(backbone.device) for p in learnt)]
            targets = torch.empty(len(hidden), dtype=torch.long, device=backbone.device)
            _Loss.apply(hidden, backbone.model.lm_head.weight, targets).backward()
        return Traced(trace.kernels, 0, trace.peak)
