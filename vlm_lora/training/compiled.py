"""Whether a run's layers are compiled, and whether what is compiled computes the same."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vlm_lora.config import COMPILED_FROM, TrainConfig
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.families import Family
from vlm_lora.training.events import Events


def is_compiled(config: TrainConfig, backbone: Backbone, sharded: bool, steps: int, events: Events) -> bool:
    """Whether the layers of a run of so many steps are compiled. A function of what all processes know, and of what a
    resumed run knows too. Warns where it is asked for and cannot be."""
    obstacle = _obstacle(config, backbone.family, sharded)
    if config.compile == "yes" and obstacle:
        events.warning(f"--compile yes does not go with {obstacle}. Nothing is compiled.")
    return would_compile(config, backbone.family, backbone.device.type, sharded, steps)


def would_compile(config: TrainConfig, family: Family, device: str, sharded: bool, steps: int) -> bool:
    """The same of a run that is only planned, on a device of this type."""
    asked = config.compile == "yes" or (config.compile == "auto" and device == "cuda" and steps >= COMPILED_FROM)
    return asked and not _obstacle(config, family, sharded)


def _obstacle(config: TrainConfig, family: Family, sharded: bool) -> str | None:
    """What cannot be compiled in one piece that serves all layers."""
    if family.recurrent:
        return f"{config.model}, whose linear attention has kernels of its own"
    if config.method == "prefix":
        return "--method prefix, whose layers each have keys and values of their own"
    if config.variant == "dora":
        return "--variant dora"
    if config.dropout:
        return "--dropout, whose random numbers it would draw in another way"
    if config.deterministic:
        return "--deterministic"
    return "a base in pieces over several GPUs" if sharded else None


COMPILER_ERRORS = (RuntimeError, AssertionError, OSError, ImportError, subprocess.SubprocessError)
"""What a compiler that is missing or lacks a header may raise, and what it made, met by a shape that it cannot do."""

GRADIENTS_WITHIN = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 1e-3}
"""By the base's format: how far the gradients of compiled layers may be from those of the plain ones, over their norm.
In bfloat16 the same step in another order differs by 0.02 (bench/results/gpu-7b.json)."""


@contextmanager
def shaken(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the adapter's tensors are not zero anywhere, so that every part of it has gradients."""
    kept = [tensor.detach().clone() for tensor in tensors]
    numbers = torch.Generator(tensors[0].device).manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=numbers, device=tensor.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.copy_(values)


def difference(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> str | None:
    """What is wrong with these gradients, for somebody who reads warnings; None: they are as good as the expected."""
    both = list(zip(found, expected, strict=True))
    dead = sum(e is not None and bool(e.any()) and (f is None or not f.any()) for f, e in both)
    if dead:
        return f"{dead} of {len(both)} adapter tensors get no gradient from it"
    pairs = [(f, e) for f, e in both if f is not None and e is not None]
    norm = torch.stack([e.norm() for _, e in pairs]).norm()
    off = float(torch.stack([(f - e).norm() for f, e in pairs]).norm() / norm)
    if not off <= GRADIENTS_WITHIN[dtype]:
        return f"its gradients are off by {off:.2g} of their norm; at most {GRADIENTS_WITHIN[dtype]:g} is rounding"
    return None


def in_short(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
