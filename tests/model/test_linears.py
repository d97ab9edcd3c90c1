"""Packed weights: the same numbers but for rounding, gradients untouched, one packed copy for all adapters."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.linears import PackedLinear, pack_linears


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 48, bias=False)).requires_grad_(False)


@pytest.fixture
def packable(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize("rows", [(1,), (8,), (3, 7), (400,), (0,), ()])
def test_packed_linears_give_the_same(model, packable, rows):
    x = torch.randn(*rows, 96)
    plain = model(x)
    pack_linears(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-5)


def test_of_a_view_too(model, packable):
    pack_linears(model)
    x = torch.randn(4, 5, 96)
    with torch.no_grad():
        assert torch.equal(model(x[:, -1]), model(x[:, -1].contiguous()))
        assert torch.equal(model(x.transpose(0, 1)), model(x.transpose(0, 1).contiguous()))


def test_the_packed_weight_is_used_and_only_where_no_gradient_is_wanted(model, packable):
    x = torch.randn(3, 96, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    pack_linears(model)
    (packed,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(plain, packed)
    with torch.no_grad():
        before = model(x)
        model[0].weight.zero_()  # what must not be done: it shows which weights are read
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


def test_what_trains_or_is_of_another_format_is_left_alone(model, packable):
    model[0].requires_grad_(True)
    model[1].to(torch.bfloat16)
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model)


def test_without_memory_for_a_second_copy_nothing_is_packed(model, packable, monkeypatch):
    size = sum(module.weight.nbytes for module in model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size - 1))
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size))
    pack_linears(model)
    assert all(isinstance(module, PackedLinear) for module in model)


def test_other_processors_keep_the_stock_kernel(model, packable, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model)


def test_all_adapters_of_a_base_share_one_packed_copy(packable):
    backbone = load_backbone("tiny")
    pack_linears(backbone.model)
    twin = backbone.twin(*backbone.pixel_limits)
    own, other = (dict(model.named_modules()) for model in (backbone.model, twin.model))
    packed = [name for name, module in own.items() if isinstance(module, PackedLinear)]
    assert "lm_head" in packed
    assert any("visual.blocks" in name for name in packed)
    assert all(own[name] is not other[name] and own[name].packed is other[name].packed for name in packed)
