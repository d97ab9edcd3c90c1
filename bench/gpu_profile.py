"""Where a step's time goes on this machine's accelerator, and what its pieces would take if computed otherwise.

    python -m bench.gpu_profile                 Qwen2-VL-2B's step, random weights; pieces at 2B and 7B shapes
    python -m bench.gpu_profile --size small    a minute on a CPU, to try the command

The step is `bench.gpu`'s. In order: time by kind of kernel of a step with every technique and of a plain one; the tower
on one image and on eight together; whether the same step gives the same numbers twice; linears with LoRA, norms and
attention, forward and backward, each as it is and in other ways. Steps are timed by the host's clock. Pieces are timed
on the device alone, medians of 10; the tower too, as far as its host stays within 20 ms. What fails is recorded as
that, and the rest goes on. The record goes to bench/results/gpu-profile.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Hopper's own default; the deterministic part needs it

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.gpu import RANK, ROOT, SIZES, VARIANTS, Work, attempt, device_name, seconds, write_model
from bench.kernels import profiled
from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.lora import _Convert, _Lower, _Raise
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.attention import packed_attention
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.device import best_device

CUDA = torch.cuda.is_available()
DEVICE = best_device()


def milliseconds(work: Callable[[], object], times: int = 10) -> float:
    for _ in range(3 if CUDA else 1):
        work()
    taken = []
    for _ in range(times if CUDA else 2):
        if not CUDA:
            taken.append(1e3 * seconds(DEVICE, work))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(40_000_000)  # some 20 ms, in which the host is done: the device alone is timed
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def forward_backward(compute: Callable, inputs: list[torch.Tensor]) -> float:
    """Milliseconds of both; ``inputs`` get gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = compute(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(out) for out in outs]

    def both() -> None:
        outs = compute(*inputs)
        torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), inputs, grads)

    return milliseconds(both)


# -- (a) the step by kind of kernel ----------------------------------------------------------------------------------


def profiled_step(work: Work, variant: str) -> dict:
    """Of one step, warmed up: time, memory, kernels."""
    how = VARIANTS[variant]
    for _ in range(2):
        work.loss(*how)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wall = min(seconds(DEVICE, lambda: work.loss(*how)) for _ in range(3))
    record = {"images": len(work.items), "tokens": sum(e.num_tokens for _, e in work.rows(how[0])), "ms": 1e3 * wall}
    record["micro_batches"] = len(work.groups(how[0])[1])
    record["useful_operations"] = work.operations(*how)
    if CUDA:
        record["peak_allocated"] = torch.cuda.max_memory_allocated()
        record["peak_reserved"] = torch.cuda.max_memory_reserved()
    record |= profiled(DEVICE, lambda: work.loss(*how))
    return record | {"busy_share_of_wall": record["busy_ms"] / 1e3 / wall}


# -- (b) pieces ------------------------------------------------------------------------------------------------------


def linears(tokens: int, width: int, outs: list[int]) -> dict:
    dtype = torch.bfloat16
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
    weights = [torch.randn(out, width, device=DEVICE, dtype=dtype) * width**-0.5 for out in outs]
    downs = [torch.randn(RANK, width, device=DEVICE) * width**-0.5 for _ in outs]
    ups = [torch.randn(out, RANK, device=DEVICE) * 0.02 for out in outs]
    n = len(outs)

    def base(x):
        return tuple(F.linear(x, w) for w in weights)

    def autograd(x, *lora):
        lora = [t.to(dtype) for t in lora]
        return tuple(o + 2.0 * F.linear(F.linear(x, lora[i]), lora[n + i]) for i, o in enumerate(base(x)))

    def some(x, which, lora):
        ranks = (RANK,) * len(which)
        down, *ups_ = _Convert.apply(dtype, (ranks,), *(lora[i] for i in which), *(lora[n + i] for i in which))
        seen, *narrow = _Lower.apply(x, down, ranks)
        return [_Raise.apply(F.linear(seen, weights[i]), narrow[k], ups_[k], 2.0) for k, i in enumerate(which)]

    def apart(x, *lora):
        return tuple(out for i in range(n) for out in some(x, [i], lora))

    def together(x, *lora):
        return tuple(some(x, list(range(n)), lora))

    record = {"base alone": attempt(lambda: forward_backward(base, [x]))}
    for way in (autograd, apart, together):
        record[way.__name__] = attempt(lambda way=way: forward_backward(way, [x, *downs, *ups]))
    expected = [F.linear(x.float(), w.float()) for w in weights]
    for way in (apart, together):
        outs = way(x, *downs, *ups)
        exact = [e + 2.0 * x.float() @ d.T @ u.T for e, d, u in zip(expected, downs, ups, strict=True)]
        record[f"error of {way.__name__}"] = max(float((o - e).norm() / e.norm()) for o, e in zip(outs, exact))  # noqa: B905
    return record


def rms_norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def swiglu(gate, up):
    return F.silu(gate) * up


def rotary(q, k, cos, sin):
    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def elementwise(tokens: int, text: dict, head: int) -> dict:
    def draw(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    weight, cos, sin = draw(text["hidden_size"]), draw(1, 1, tokens, head), draw(1, 1, tokens, head)
    # Heads behind tokens in memory, as the projections give them.
    q, k = (draw(1, tokens, text[f"num_{n}_heads"], head).transpose(1, 2) for n in ("attention", "key_value"))
    cases = {
        "RMSNorm": (lambda f: lambda x: f(x, weight), rms_norm, [draw(tokens, text["hidden_size"])]),
        "SwiGLU": (lambda f: f, swiglu, [draw(tokens, text["intermediate_size"]) for _ in range(2)]),
        "rotary": (lambda f: lambda q, k: f(q, k, cos, sin), rotary, [q, k]),
    }
    record = {}
    for name, (bind, function, inputs) in cases.items():
        compiled = torch.compile(function, dynamic=False, backend="inductor" if CUDA else "eager")
        record[name] = {
            way: attempt(lambda b=bind, f=f, i=inputs: forward_backward(b(f), i))
            for way, f in (("eager", function), ("compiled", compiled))
        }
    return record


def joined(q, k, v, prefix: int, each: int) -> torch.Tensor:
    """The branches' part as two calls without a mask, joined by their log-sum-exp; the prefix's as one. Forward."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    rows = len(q)

    def alone(t):  # each branch a row
        t = t[:, :, prefix:].unflatten(2, (-1, each)).transpose(1, 2)
        return t.flatten(0, 1)

    first = flash(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], 0.0, True)[0]
    on_prefix, lse = flash(q[:, :, prefix:], k[:, :, :prefix], v[:, :, :prefix], 0.0, False)[:2]
    own, own_lse = flash(alone(q), alone(k), alone(v), 0.0, True)[:2]
    own, own_lse = (t.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3) for t in (own, own_lse))
    share = torch.sigmoid(lse - own_lse)[..., None]
    both = (share * on_prefix + (1 - share) * own).to(q.dtype)
    return torch.cat([first, both], 2)


def attention(text: dict, head: int, image: int, branches: int = 5, each: int = 20) -> dict:
    prefix = image + 20
    length, heads, pairs = prefix + branches * each, text["num_attention_heads"], text["num_key_value_heads"]
    rows = max(1, (8192 if CUDA else 512) // length)

    def draw(heads):
        return torch.randn(rows, length, heads, head, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = draw(heads), draw(pairs), draw(pairs)
    of = torch.zeros(length, dtype=torch.int32, device=DEVICE)
    of[prefix:] = 1 + torch.arange(branches * each, device=DEVICE) // each
    seen = (of[None, :] == 0) | (of[prefix:, None] == of[None, :])
    seen &= torch.ones(branches * each, length, dtype=torch.bool, device=DEVICE).tril(prefix)
    mask = torch.zeros(rows, 1, *seen.shape, device=DEVICE, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    module = SimpleNamespace(num_key_value_groups=heads // pairs, is_causal=True, training=True)

    def today(q, k, v):
        return packed_attention(module, q, k, v, mask, dropout=0.0)[0]

    def causal_flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def visible(_, __, i, j):
        return (i >= j) & ((of[j] == 0) | (of[j] == of[i]))

    def block_mask():
        return create_block_mask(visible, None, None, length, length, device=DEVICE.type)

    torch._dynamo.reset()  # at its limit of shapes it would stop compiling, with no more than a warning
    compiled = torch.compile(flex_attention, dynamic=False, backend="inductor" if CUDA else "eager")

    def flex(q, k, v, blocks=block_mask()):  # noqa: B008
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    record = {"rows": rows, "tokens": rows * length}
    for way in (today, causal_flash, flex):
        record[way.__name__] = attempt(lambda way=way: forward_backward(way, [q, k, v]))
        record[f"{way.__name__}, forward"] = attempt(lambda way=way: milliseconds(lambda: way(q, k, v)))
    record["making a block mask"] = attempt(lambda: milliseconds(block_mask, 3))
    record["two calls, forward"] = attempt(lambda: milliseconds(lambda: joined(q, k, v, prefix, each)))
    right = today(q, k, v).transpose(1, 2)
    for name, way in (("two calls", lambda: joined(q, k, v, prefix, each)), ("flex", lambda: flex(q, k, v))):
        record[f"difference, {name}"] = attempt(lambda way=way: float((way() - right).norm() / right.norm()))
    return record


# -- (c) the tower, (d) the same twice -------------------------------------------------------------------------------


def tower(work: Work) -> dict:
    backbone, patches = work.backbone, work.patches[:8]
    pixels, grids = (torch.cat([p[i] for p in patches]) for i in (0, 1))
    count = len(patches)
    one = torch.cat([backbone.tower(*p) for p in patches])
    many = backbone.tower(pixels, grids)
    return {
        "images": count,
        "ms an image, one at a time": milliseconds(lambda: [backbone.tower(*p) for p in patches]) / count,
        "ms an image, together": milliseconds(lambda: backbone.tower(pixels, grids)) / count,
        "bitwise equal": torch.equal(one, many),
        "the same image twice, bitwise equal": torch.equal(one, torch.cat([backbone.tower(*p) for p in patches])),
        "difference": float((one.float() - many.float()).norm() / one.float().norm()),
    }


def twice(work: Work, tensors: dict[str, torch.nn.Parameter], deterministic: bool, only_warn: bool = False) -> dict:
    def once() -> tuple[float, dict[str, torch.Tensor]]:
        for tensor in tensors.values():
            tensor.grad = None
        loss = work.loss(*VARIANTS["all"])
        return loss, {name: t.grad.clone() for name, t in tensors.items()}

    torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            (loss, gradients), (again, others) = once(), once()
            taken = statistics.median(seconds(DEVICE, lambda: work.loss(*VARIANTS["all"])) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    differing = [n for n, g in gradients.items() if not torch.equal(g, others[n])]
    whole = [torch.cat([g.flatten() for g in each.values()]) for each in (gradients, others)]
    return {
        "loss equal": loss == again,
        "tensors": len(gradients),
        "tensors that differ": len(differing),
        "some of them": differing[:3] + differing[-3:],
        "gradients' difference": float((whole[0] - whole[1]).norm() / whole[0].norm()),
        "ms": 1e3 * taken,
        "warned": sorted({str(w.message)[:200] for w in warned if "determinis" in str(w.message)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2b", choices=list(SIZES))
    small = parser.parse_args().size == "small"
    size = "small" if small else "2b"
    record = {"device": device_name(DEVICE), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    started = time.perf_counter()

    def part(name: str, work: Callable[[], object]) -> None:
        record[name] = attempt(work)
        record["seconds so far"] = round(time.perf_counter() - started, 1)
        print(json.dumps({name: record[name], "seconds so far": record["seconds so far"]}), flush=True)
        path = ROOT / "bench/results" / f"gpu-profile{'-small' if small else ''}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        write_model(size, Path(folder), DEVICE, torch.bfloat16)
        backbone = load_backbone(folder, dtype="bfloat16", device=DEVICE)
        images, side = (2, 56) if small else (32, 448)
        work, fewer, few = (
            Work(backbone, n, 5, side, 12, 8192) for n in (images, 1 if small else 10, 1 if small else 4)
        )
        adapter = attach_adapter(backbone, TrainConfig(data="none", rank=RANK))
        tensors = dict(adapter.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.02 * torch.randn_like(tensor))
    backbone.model.train()
    part("step", lambda: profiled_step(work, "all"))
    part("step of 10 images", lambda: profiled_step(fewer, "all"))
    part("plain step of 4 images", lambda: profiled_step(few, "plain"))
    part("tower", lambda: tower(work))
    part("twice", lambda: twice(work, tensors, False))
    part("twice, deterministic", lambda: twice(work, tensors, True))
    if "failed" in record["twice, deterministic"]:
        part("twice, deterministic where it can be", lambda: twice(work, tensors, True, True))
    for shape in ["small"] if small else ["2b", "7b"]:
        text = SIZES[shape]["text"]
        width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
        head = width // heads
        pairs = text["num_key_value_heads"] * head
        for tokens in (64,) if small else (4096, 8192):
            groups = {"q, k, v": (width, [width, pairs, pairs]), "o": (width, [width]),
                      "gate, up": (width, [inner, inner]), "down": (inner, [width])}  # fmt: skip
            for name, (narrow, outs) in groups.items():
                part(f"{shape}, {tokens} tokens, {name}", lambda n=narrow, o=outs, t=tokens: linears(t, n, o))
            part(f"{shape}, {tokens} tokens, elementwise", lambda t=tokens, x=text, h=head: elementwise(t, x, h))
        for image in (64,) if small else (256, 1280, 4096):
            part(f"{shape}, attention, {image} image tokens", lambda i=image, x=text, h=head: attention(x, h, i))


if __name__ == "__main__":
    main()
