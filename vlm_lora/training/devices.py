"""What accelerators can do, and how long a trace takes on one."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line shows the names of the devices, and does not wait for torch
    from vlm_lora.training.trace import Kernel, Traced

ATTAINED = 0.81
"""The share of its published rates that a device attains in one large kernel: an H200 790 of 989 TFLOP/s, and 3.9 of
4.8 TB/s (bench/results/gpu-profile.json)."""

SMALLEST = 2e-6
"""Seconds that a kernel takes at least on the device."""

LAUNCH = 5e-6
"""Seconds that the host takes at least to start a kernel. PyTorch, from Python, takes more: 40e-6 was measured."""

RESERVED = 1.07
"""What torch reserves of a GPU's memory over what it uses at the peak: 32.5 against 30.6 GB in that record."""

Bound = Literal["products", "memory traffic", "launches"]


@dataclass(frozen=True, slots=True)
class Device:
    """Published figures: dense operations a second in 16-bit formats and in float32 (no TF32), bytes a second to and
    from memory, and bytes of memory."""

    tensor: float
    float32: float
    bandwidth: float
    memory: float
    bfloat16: bool = True


DEVICES = {
    "h200": Device(989e12, 67e12, 4.8e12, 141e9),
    "h100": Device(989e12, 67e12, 3.35e12, 80e9),
    "a100": Device(312e12, 19.5e12, 2.039e12, 80e9),
    "l40s": Device(362e12, 91.6e12, 0.864e12, 48e9),
    "l4": Device(121e12, 30.3e12, 0.3e12, 24e9),
    "a10": Device(125e12, 31.2e12, 0.6e12, 24e9),
    "4090": Device(165e12, 82.6e12, 1.008e12, 24e9),
    "3090": Device(71e12, 35.6e12, 0.936e12, 24e9),
    "t4": Device(65e12, 8.1e12, 0.32e12, 16e9, bfloat16=False),
}
"""By the names of `vlm-lora plan --device`; NVIDIA's data sheets, products accumulated in float32."""


def device_named(name: str, memory: int) -> Device:
    """The device that the driver calls so, as "NVIDIA GeForce RTX 4090", with its bytes of memory; an A100's other
    figures where it is not in the list."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return replace(DEVICES[next((each for each in DEVICES if each in words), "a100")], memory=memory)


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds that a pass takes: ``products`` of kernels that wait for arithmetic, ``traffic`` of those that wait for
    memory, ``launches`` of the host, which works beside the device."""

    products: float
    traffic: float
    launches: float

    @property
    def device(self) -> float:
        return self.products + self.traffic

    @property
    def seconds(self) -> float:
        return max(self.device, self.launches)

    @property
    def bound(self) -> Bound:
        """What the pass waits for most."""
        if self.launches > self.device:
            return "launches"
        return "products" if self.products > self.traffic else "memory traffic"


def price(traced: "Traced", device: Device) -> Price:
    """How long a device takes for a pass."""
    products = traffic = 0.0
    for kernel, times in traced.kernels.items():
        arithmetic, memory = kernel_seconds(kernel, device)
        if arithmetic > memory:
            products += times * arithmetic
        else:
            traffic += times * memory
    return Price(products, traffic, LAUNCH * traced.num_kernels)


def kernel_seconds(kernel: "Kernel", device: Device) -> tuple[float, float]:
    """Of its arithmetic, and of its memory traffic; it takes the longer of both."""
    rate = device.float32 if kernel.dtype.itemsize >= 4 else device.tensor
    return kernel.operations / rate / ATTAINED, max(kernel.num_bytes / device.bandwidth / ATTAINED, SMALLEST)
