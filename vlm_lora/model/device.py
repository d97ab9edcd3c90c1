"""What a device can do: the number format it computes in, and whether it ran out of memory."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm_lora.errors import ConfigError


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room left. The CPU's says so as a plain RuntimeError."""
    told = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in told)


def peak_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU at the highest so far: used, and reserved by torch, which keeps more. None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def process_peak() -> int:
    """Bytes of main memory that this process had at its highest so far, files that it has mapped among them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def in_one_order() -> Iterator[None]:
    """Inside, every sum is computed in the same order each time, also by a GPU, whose gradients of attention are not by
    default: 384 of 396 tensors of a step differ in their last bits from those of the same step again
    (bench/results/gpu-profile.json)."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's library is set up
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where a GPU computes it natively, float16 on one that has products in that alone (compute
    capability 7.0 to 7.5, as a T4), float32 elsewhere.

    Raises:
        ConfigError: bfloat16 is asked for, and the device cannot do it.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} cannot compute in it. Give --dtype float16 or "
            "float32, or leave --dtype out."
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
