"""A GPU's kernels for linear attention: whether they are there, and are releases whose gradients are right."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from vlm_lora.errors import ModelError

FLA = "flash-linear-attention"
OLDEST = "0.6.0"
"""Of `FLA`. Those before compute wrong gradients of the gates on Hopper, in silence (its issue 640)."""

WRONG_TRITON = "3.4.0", "3.7.1"
"""With these releases, from the first to short of the last, any kernel of Triton's for them is wrong on Hopper."""


def require_sound(name: str, device: torch.device) -> None:
    """Warn if the model ``name`` will be slow on this GPU for want of kernels.

    Raises:
        ModelError: the kernels that are installed would compute wrong gradients.
    """
    if device.type != "cuda":
        return
    found = _release(FLA)
    if found is None:
        warnings.warn(
            f"{name} computes its linear attention without {FLA} here, right but several times slower: "
            "pip install 'vlm-lora[gpu]'.",
            stacklevel=2,
        )
        return
    if found < Version(OLDEST):
        raise ModelError(
            f"--model {name}: {FLA} {found} computes wrong gradients on some GPUs. Install {OLDEST} or newer: "
            "pip install -U 'vlm-lora[gpu]'."
        )
    triton = _release("triton")
    first, end = map(Version, WRONG_TRITON)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if hopper and triton is not None and first <= triton < end and _release("tilelang") is None:
        raise ModelError(
            f"--model {name}: with Triton {triton}, {FLA} computes wrong gradients on this GPU "
            f"({torch.cuda.get_device_name(device)}). pip install 'triton>={WRONG_TRITON[1]}', or tilelang beside it."
        )


def _release(package: str) -> Version | None:
    try:
        return Version(version(package))
    except PackageNotFoundError:
        return None
