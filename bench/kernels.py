"""A step's kernels by class: as the profiler finds them on this device, and as `vlm-lora plan` traces and prices them.

On a CPU, where this can only be tried, operators stand for kernels, each beside those that it is made of.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vlm_lora.training.devices import Device, kernel_seconds
from vlm_lora.training.trace import Traced

KINDS = {  # by the kernel's name, the first that fits
    "attention": r"flash|fmha|sdpa|attention",
    "softmax, cross-entropy": r"softmax|nll|cross_entropy",
    "float32 products": r"sgemm|f32f32_f32|simt|gemmsn|gemv|gemvx|ffma|convolve",
    "bfloat16 products": r"nvjet|gemm|cutlass|xmma|splitk|aten::mm|aten::addmm|aten::bmm",
    "conversions, copies": r"copy|memcpy|cat|aten::clone",
    "optimizer": r"multi_tensor|foreach|adam",
    "reductions": r"reduce|norm|mean|sum",
    "elementwise": r"elementwise|triton|aten::(mul|add|neg|silu)",
    "rest": "",
}  # fmt: skip


def kind_of(name: str) -> str:
    return next(kind for kind, part in KINDS.items() if re.search(part, name, re.IGNORECASE))


def summed(kernels: Iterable[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """Count and milliseconds of each name, from names, counts and seconds; those that take longest come first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, count, seconds in kernels:
        sums[name][0] += count
        sums[name][1] += 1e3 * seconds
    return {k: {"count": n, "ms": ms} for k, (n, ms) in sorted(sums.items(), key=lambda kv: -kv[1][1])}


def profiled(device: torch.device, step: Callable[[], object]) -> dict:
    """Of one step: its kernels, the milliseconds in which any of them ran, and those by class and of the longest."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)]
    busy, until, ran = 0.0, 0.0, []
    for kernel in sorted(kernels, key=lambda k: k.time_range.start):
        start, end = kernel.time_range.start, kernel.time_range.end
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        ran.append((kernel.name, 1, (end - start) / 1e6))
    longest = summed((f"{kind_of(name)}: {name[:230]}", count, took) for name, count, took in ran)
    return {
        "kernels": len(kernels),
        "busy_ms": busy / 1e3,
        "kinds": summed((kind_of(name), count, took) for name, count, took in ran),
        "top": [{"kernel": name} | sums for name, sums in list(longest.items())[:25]],
    }


def traced_kinds(traced: Traced, device: Device) -> dict[str, dict[str, float]]:
    """Of a trace, priced for the device. What an operator does beside all that `KINDS` names is elementwise: most of
    what the profiler calls so has names of its own in the trace."""

    def kind(name: str, dtype: torch.dtype) -> str:
        found = kind_of(f"aten::{name}")
        if found == "bfloat16 products" and dtype.itemsize >= 4:
            return "float32 products"
        return "elementwise" if found == "rest" else found

    kernels = traced.kernels.items()
    return summed((kind(k.name, k.dtype), count, count * max(kernel_seconds(k, device))) for k, count in kernels)
