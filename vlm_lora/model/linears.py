"""Linears of a model that only speaks, on a CPU: their weights laid out once as the kernels of oneDNN read them.

A few rows at a time, a matrix product takes as long as reading its weights does. The stock kernel rearranges them
first, anew in each product; beside it, 8 rows take half the time and 256 rows four fifths.
"""

import platform

import psutil
import torch
from torch import nn

ROWS = 256
"""For so many rows the layout is asked for; it hardly differs for fewer or more."""
MEMORY_SHARE = 0.5
"""Of the free memory, for the second copy of the weights."""


class PackedLinear(nn.Linear):
    """A linear with its weight in a second layout, ``packed``. The plain one stays: gradients and merging need it."""

    packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # this kernel knows none
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Have the model's frozen float32 linears on the CPU compute from packed weights wherever no gradient is wanted.

    Their weights must not change any more. Nothing is done where there is no memory for a second copy of them, or on
    other processors than those this was measured on.
    """
    linears = [module for module in model.modules() if _can_be_packed(module)]
    supported = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    room = MEMORY_SHARE * psutil.virtual_memory().available
    if not supported or sum(module.weight.nbytes for module in linears) > room:
        return
    for module in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
        module.__class__ = PackedLinear
        module.packed = packed


def _can_be_packed(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:  # another class computes otherwise, in four bits for one; or it is packed
        return False
    weight = module.weight
    whole = type(weight.data) is torch.Tensor  # and not in pieces over several processes
    return whole and weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
