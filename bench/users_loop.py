"""The loop that users run on a GPU, on the weights of a model that is there: transformers and PEFT under autocast.

A row for each answer, the vision tower in each step, attention by the kernel that needs no mask (rows are padded on the
right, where a causal row sees nothing). Liger's operators where `liger_kernel` can be imported: its fused loss then
never holds all logits; without it they are held, of every token. LoRA is PEFT's own, in float32.
"""

import copy
import importlib
import sys
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model

from vlm_lora.config import TrainConfig
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.packing import IGNORE_INDEX, pack_apart

if TYPE_CHECKING:
    from bench.gpu import Work


class UsersLoop:
    """Made before anything is attached to ``backbone``, whose weights it shares."""

    def __init__(self, backbone: Backbone, config: TrainConfig, liger: str | None = None):
        """``liger``: why it is not used."""
        self.backbone = backbone
        model = copy.deepcopy(backbone.model, {id(p): p for p in backbone.model.parameters()})
        model.model.language_model.set_attn_implementation("sdpa")
        self.modelling: Any = sys.modules[type(model).__module__]
        self.patched: dict[str, Any] = {}
        self.liger = liger or self._use_liger(model)
        targets = "|".join(f"(?:{backbone.family.linears[part]})" for part in config.lora_targets)
        settings = LoraConfig(r=config.rank, lora_alpha=int(config.lora_alpha), target_modules=targets)
        self.model = get_peft_model(model, settings)
        self.model.train()
        self.tensors: list[torch.nn.Parameter] = []

    def _use_liger(self, model: Any) -> str:
        """Its version, or why it is not there. It patches functions of transformers' module, for all models; they are
        patched in this loop's passes alone."""
        try:
            patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
        except ImportError as error:
            return f"not imported: {error}"
        before = dict(vars(self.modelling))
        try:
            getattr(patches, f"apply_liger_kernel_to_{model.config.model_type}")(model=model)
        finally:
            self.patched = {name: v for name, v in vars(self.modelling).items() if before.get(name) is not v}
            vars(self.modelling).update(before)
        return version("liger-kernel")

    @torch.no_grad()
    def take(self, tensors: dict[str, torch.nn.Parameter]) -> None:
        """The LoRA tensors of the same names, which it then lists as ``tensors`` in the same order."""
        own = dict(self.model.base_model.model.named_parameters())
        self.tensors = [own[name] for name in tensors]
        assert len(tensors) == sum(p.requires_grad for p in own.values()), "other linears are adapted"
        for mine, theirs in zip(self.tensors, tensors.values(), strict=True):
            mine.copy_(theirs)

    def loss(self, work: "Work", most: int | None = None) -> float:
        """Mean loss of the step, or of its first micro-batches; leaves its gradients."""
        rows, groups = work.groups(shared=False)
        groups = groups[:most]
        device, total = self.backbone.device, torch.zeros((), device=self.backbone.device)
        packed = [pack_apart([rows[i][1] for i in group], self.backbone.pad_token_id) for group in groups]
        counts = [int((each.labels != IGNORE_INDEX).sum()) for each in packed]
        for group, each, count in zip(groups, packed, counts, strict=True):
            pixels, grids = (torch.cat([work.patches[rows[i][0]][k] for i in group]).to(device) for k in (0, 1))
            with ExitStack() as stack:
                for name, patch in self.patched.items():
                    stack.enter_context(mock.patch.object(self.modelling, name, patch))
                narrow = self.backbone.dtype == torch.bfloat16
                stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=narrow))
                loss = self.model(
                    input_ids=each.input_ids.to(device),
                    position_ids=each.position_ids.to(device),
                    labels=each.labels.to(device),
                    pixel_values=pixels,
                    image_grid_thw=grids,
                    use_cache=False,
                ).loss
            loss = loss * (count / sum(counts))
            loss.backward()
            total += loss.detach()
        return total.item()
