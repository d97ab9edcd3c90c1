"""Linear attention on a GPU: kernels that are missing are named, and those that compute wrong gradients refused."""

import inspect
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from vlm_lora.errors import ModelError
from vlm_lora.model import backbone as loading
from vlm_lora.model import kernels, recurrent

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def with_releases(monkeypatch, capability=(8, 0), **releases) -> None:
    found = {name.replace("_", "-"): Version(release) for name, release in releases.items()}
    monkeypatch.setattr(kernels, "_release", found.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


@pytest.mark.parametrize(
    ("capability", "releases"),
    [
        ((8, 0), {"flash_linear_attention": "0.6.0", "triton": "3.5.0"}),
        ((9, 0), {"flash_linear_attention": "0.6.0", "triton": "3.7.1"}),
        ((9, 0), {"flash_linear_attention": "0.7.1", "triton": "3.3.1"}),
        ((9, 0), {"flash_linear_attention": "0.6.0", "triton": "3.5.0", "tilelang": "0.1.9"}),
    ],
)
def test_sound_kernels_are_taken_without_a_word(monkeypatch, recwarn, capability, releases):
    with_releases(monkeypatch, capability, **releases)
    kernels.require_sound("x", GPU)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("capability", "releases", "told"),
    [
        (
            (8, 0),
            {"flash_linear_attention": "0.5.2", "triton": "3.8.0"},
            r"0\.5\.2 computes wrong .* -U 'vlm-lora\[gpu\]'",
        ),
        ((9, 0), {"flash_linear_attention": "0.6.0", "triton": "3.4.0"}, r"Triton 3\.4\.0, .*H100.*'triton>=3\.7\.1'"),
        ((9, 0), {"flash_linear_attention": "0.6.0", "triton": "3.7.0"}, r"Triton 3\.7\.0"),
    ],
)
def test_wrong_gradients_are_refused_in_one_line(monkeypatch, capability, releases, told):
    with_releases(monkeypatch, capability, **releases)
    with pytest.raises(ModelError, match=told) as caught:
        kernels.require_sound("x", GPU)
    assert "\n" not in str(caught.value)
    kernels.require_sound("x", CPU)


def test_without_kernels_a_gpu_is_slow_and_says_so(monkeypatch, recwarn):
    with_releases(monkeypatch)
    with pytest.warns(
        UserWarning, match=r"x computes .* right but several times slower: pip install 'vlm-lora\[gpu\]'"
    ):
        kernels.require_sound("x", GPU)
    recwarn.clear()
    kernels.require_sound("x", CPU)
    assert not recwarn.list


def test_it_is_asked_before_the_weights_are_read_and_of_linear_attention_alone(checkpoints, monkeypatch):
    asked = []
    monkeypatch.setattr(loading.kernels, "require_sound", lambda name, device: asked.append(device))
    loading.load_backbone(str(checkpoints["qwen2_vl"]))
    assert asked == []
    loading.load_backbone(str(checkpoints["qwen3_5"]), device=CPU)
    assert asked == [CPU]


def test_kernels_that_are_installed_get_a_gpus_tensors_alone(checkpoints, monkeypatch):
    """Upstream would give them a CPU's too, and on the meta device those that `vlm-lora plan` computes with."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modelling

    recurrent.kernels_on_gpus_alone(modelling)
    plain, seen = inspect.unwrap(modelling.torch_chunk_gated_delta_rule.args[0]), []
    names = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule")
    names = (*names, "torch_recurrent_gated_delta_rule")
    for name in names:
        upstream = inspect.unwrap(getattr(modelling, name).args[0])
        monkeypatch.setattr(modelling, name, wraps(upstream)(lambda values, *_, **__: seen.append(values)))
    backbone = loading.load_backbone(str(checkpoints["qwen3_5"]))
    assert plain is inspect.unwrap(modelling.torch_chunk_gated_delta_rule.args[1])
    ids, ones = torch.arange(5, 15)[None], torch.ones(1, 11)
    cache, positions = backbone.new_cache(), torch.arange(11).expand(3, 1, -1)
    backbone.forward(ids, ones[:, :10], positions[..., :10], None, cache)
    backbone.forward(ids[:, :1], ones, positions[..., 10:], None, cache)
    assert seen == []
    there = SimpleNamespace(is_cuda=True)
    for name in names:
        getattr(modelling, name)(there)
    assert seen == [there] * 4


def test_on_a_cpu_transformers_does_not_ask_for_kernels(checkpoints, caplog):
    backbone = loading.load_backbone(str(checkpoints["qwen3_5"]))
    ids = torch.arange(5, 15)[None]
    backbone.forward(ids, torch.ones(1, 10), torch.arange(10).expand(3, 1, -1), None)
    assert "falling back" not in caplog.text
