"""The faster forward of plain LoRA is PEFT's own, in value and gradient.

Run: pytest tests/model/test_lora.py
"""

import pytest
import torch
from peft.tuners.lora import Linear

from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters import lora
from vlm_lora.model.adapters.lora import _PlainLora
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.training.trace import Trace


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["no dropout", "dropout"])
def backbone(checkpoints, request):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    attach_adapter(backbone, TrainConfig(data="none", rank=4, alpha=7, dropout=request.param, seed=1))
    return backbone


@pytest.fixture(params=["mlp.gate_proj", "self_attn.k_proj"])  # without and with a bias
def layer(backbone, request):
    layer = backbone.language_model.layers[0].get_submodule(request.param)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer.train()


def outcome(layer, forward) -> list[torch.Tensor]:
    """Output and gradients of input, A and B."""
    layer.zero_grad()
    torch.manual_seed(5)  # dropout
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.base_layer.weight.dtype).requires_grad_()
    out = forward(x)
    out.square().sum().backward()
    grads = x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    return [out.detach().double(), *(grad.double() for grad in grads)]


@pytest.mark.parametrize(("base", "lora", "tolerance"), [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.float32, 4e-3),  # half a step of bfloat16: what lies between two is rounded either way
])  # fmt: skip
def test_plain_lora_is_pefts(layer, base, lora, tolerance):
    layer.base_layer.to(base)
    layer.lora_A.to(lora)
    layer.lora_B.to(lora)
    assert isinstance(layer, _PlainLora)  # else both are the same
    ours, theirs = outcome(layer, layer), outcome(layer, lambda x: Linear.forward(layer, x))
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine - expected).norm() / expected.norm() < tolerance
    layer.scaling["default"] *= 1.1  # negative control
    assert not torch.allclose(outcome(layer, layer)[0], theirs[0], rtol=1e-2)
    layer.scaling["default"] /= 1.1


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_in_bfloat16_it_is_as_right_as_pefts_float32(layer, monkeypatch, size):
    """What a GPU computes: products in the base's format, from float32 weights, with float32 gradients. Held against
    float64 over the same rounded base, input and output, beside PEFT's way, which rounds once at the end."""
    layer.base_layer.to(torch.bfloat16)
    layer.lora_A.float()
    torch.nn.init.normal_(layer.lora_B.float()["default"].weight, std=size, generator=torch.Generator().manual_seed(3))
    theirs = outcome(layer, lambda x: Linear.forward(layer, x))
    monkeypatch.setattr(lora, "_product_dtype", lambda out, up: out.dtype)
    ours = outcome(layer, layer)
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32

    layer.base_layer.double()  # the values stay those of bfloat16
    layer.lora_A.double()
    layer.lora_B.double()
    exact = outcome(layer, layer)
    for mine, other, expected in zip(ours, theirs, exact, strict=True):
        off, usual = ((each - expected).norm() / expected.norm() for each in (mine, other))
        assert off < 2.5 * usual
    layer.scaling["default"] *= 1.1  # negative control
    assert (outcome(layer, layer)[2] - exact[2]).norm() / exact[2].norm() > 0.02
    layer.scaling["default"] /= 1.1


def test_it_learns_from_an_input_that_wants_no_gradient(layer):
    layer.base_layer.to(torch.float32)
    layer(torch.randn(2, 3, layer.in_features)).sum().backward()
    assert all(lora["default"].weight.grad.norm() > 0 for lora in (layer.lora_A, layer.lora_B))


def test_switched_off_it_is_the_base(layer):
    layer.base_layer.to(torch.float32)
    x = torch.randn(1, 2, layer.in_features)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_a_gpu_converts_each_of_its_tensors_once():
    """Of a linear over a base in bfloat16: both of its tensors there, both of their gradients back."""
    out, x = (torch.empty(8, 40, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    down, up = (
        torch.empty(4, 40, device="meta", requires_grad=True),
        torch.empty(40, 4, device="meta", requires_grad=True),
    )
    with Trace() as trace:
        added = lora._AddLowRank.apply(out, x, down, up, 2.0, torch.bfloat16)
        torch.autograd.grad(added, (out, x, down, up), torch.empty_like(added))
    started = {kernel.name: 0 for kernel in trace.kernels}
    for kernel, times in trace.kernels.items():
        started[kernel.name] += times
    assert started == {"_to_copy": 4, "mul": 2, "mm": 5, "addmm": 1}
