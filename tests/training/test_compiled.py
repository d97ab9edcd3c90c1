"""Compiled layers train the same numbers, or are not used."""

from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model.test_exactness import FAMILIES, examples, fast, load  # noqa: F401  # examples is a fixture
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora.config import COMPILED_FROM, TrainConfig
from vlm_lora.model.backbone import Backbone
from vlm_lora.training.compiled import difference, is_compiled
from vlm_lora.training.events import Events
from vlm_lora.training.run import train_adapter as train


class Heard(Events):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.compiled = 0

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def compiling(self) -> None:
        self.compiled += 1


@pytest.mark.parametrize(
    "family",
    [family if family == "qwen2_vl" else pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[:3]],
)
def test_one_compilation_serves_all_layers_and_shapes(checkpoints, examples, family):  # noqa: F811
    """But a single row has one of its own, and rows with images differ from rows of text alone."""
    backbone, adapter = load(checkpoints, family, torch.float32)
    parameters = [parameter for _, parameter in adapter.named_parameters()]
    passes = [examples[:3], examples[1:5], examples[:2], examples[3:7]]

    def step(chosen) -> tuple[torch.Tensor, torch.Tensor]:
        backbone.model.zero_grad()
        loss = fast(backbone, chosen, 100_000)
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    backbone.model.train()
    plain = [step(chosen) for chosen in passes]
    torch._dynamo.reset()
    counters.clear()
    backbone.compile_layers("aot_eager")
    for chosen, (loss, gradient) in zip(passes, plain, strict=True):
        found, other = step(chosen)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    before = counters["stats"]["calls_captured"]
    backbone.use_compiled(False)
    step(passes[0])
    backbone.use_compiled(True)
    with torch.no_grad():
        fast(backbone, passes[0], 100_000)
    assert counters["stats"]["calls_captured"] == before


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_with_compiled_layers(checkpoints, photo_folder, tmp_path, monkeypatch, checkpointing):
    monkeypatch.setattr(Backbone, "compile_layers", partialmethod(Backbone.compile_layers, "aot_eager"))
    settings = config(checkpoints, photo_folder, tmp_path / "run", dropout=0.0, max_steps=3, compile="yes")
    torch._dynamo.reset()
    counters.clear()
    heard = Heard()
    run = train(settings.replace(gradient_checkpointing=checkpointing), events=heard)
    assert heard.compiled == 1
    assert heard.warnings == []
    assert counters["stats"]["unique_graphs"] >= 1
    plain = train(settings.replace(output=str(tmp_path / "plain"), compile="no"))
    for name, tensor in adapter_of(plain.folder).items():
        torch.testing.assert_close(adapter_of(run.folder)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def _wrong(forward, nth: int):
    """A compiler whose layers compute something else (0), or nothing from the nth time on."""
    calls = []

    def compiled(*args, **kwargs):
        calls.append(1)
        if nth and len(calls) >= nth:
            raise AssertionError("expected size 4==4, stride 18240==19776 at dim=0")
        out = forward(*args, **kwargs)
        return out if nth else out + 0.5 * out.detach().tanh() * out

    return compiled


@pytest.mark.parametrize(
    ("nth", "why"),
    [(0, "off by"), (1, "AssertionError: expected size"), (8, "AssertionError: expected size")],
    ids=["wrong", "none", "late"],
)
def test_what_a_compiler_gets_wrong_is_not_used(checkpoints, photo_folder, tmp_path, monkeypatch, nth, why):
    """The run is the one without it, to the bit; also where a shape is met that it cannot do, in the middle."""
    settings = config(checkpoints, photo_folder, tmp_path / "run", dropout=0.0, max_steps=6, compile="yes")
    settings = settings.replace(micro_batch_tokens=60)  # several a step: what the first has added up must not stay
    plain = train(settings.replace(output=str(tmp_path / "plain"), compile="no"))
    monkeypatch.setattr(torch, "compile", lambda forward, **_: _wrong(forward, nth))
    heard = Heard()
    run = train(settings, events=heard)
    (warning,) = heard.warnings
    assert why in warning
    assert "continues without" in warning
    assert_same(adapter_of(run.folder), adapter_of(plain.folder))


def test_a_run_that_is_resumed_at_its_end_has_nothing_to_compile(checkpoints, photo_folder, tmp_path, monkeypatch):
    settings = config(checkpoints, photo_folder, tmp_path / "run", dropout=0.0, compile="yes", max_steps=3)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    train(settings, events=(heard := Heard()))
    assert heard.compiled == 1
    train(settings, resume=True, events=(heard := Heard()))
    assert heard.compiled == 0
    assert heard.warnings == []


def test_dead_tensors_are_wrong_however_small_they_are():
    large, small = torch.full((9,), 100.0), torch.full((9,), 1e-6)
    assert difference([large, small], [large, small], torch.float32) is None
    assert difference([large, None], [large, torch.zeros(9)], torch.float32) is None
    assert "1 of 2" in difference([large, torch.zeros(9)], [large, small], torch.float32)
    assert "1 of 2" in difference([None, small], [large, small], torch.float32)
    assert difference([1.05 * large, small], [large, small], torch.bfloat16) is None
    assert "off by 0.05" in difference([1.05 * large, small], [large, small], torch.float32)
    assert "off by nan" in difference([large * torch.nan, small], [large, small], torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "device", "steps", "compiled", "warned"),
    [
        ({}, "cuda", COMPILED_FROM, True, ""),
        ({}, "cuda", COMPILED_FROM - 1, False, ""),
        ({}, "cpu", COMPILED_FROM, False, ""),
        ({"compile": "no"}, "cuda", COMPILED_FROM, False, ""),
        ({"compile": "yes"}, "cpu", 1, True, ""),
        ({"compile": "yes", "method": "prefix"}, "cuda", 1, False, "--method prefix"),
        ({"compile": "yes", "variant": "dora"}, "cuda", 1, False, "dora"),
        ({"compile": "yes", "dropout": 0.1}, "cuda", 1, False, "--dropout"),
        ({"compile": "yes", "deterministic": True}, "cuda", 1, False, "--deterministic"),
        ({"method": "prefix"}, "cuda", COMPILED_FROM, False, ""),
    ],
)
def test_what_is_compiled(changes, device, steps, compiled, warned):
    backbone = SimpleNamespace(device=torch.device(device), family=SimpleNamespace(recurrent=False))
    heard = Heard()
    assert is_compiled(TrainConfig(data="x", **changes), backbone, False, steps, heard) == compiled
    assert len(heard.warnings) == bool(warned)
    assert all(warned in text for text in heard.warnings)
    for odd, sharded in ((True, False), (False, True)):  # Qwen3.5's linear attention, FSDP
        backbone.family.recurrent = odd
        assert not is_compiled(TrainConfig(data="x", **changes), backbone, sharded, steps, heard)


def test_a_deterministic_run_asks_for_it_and_leaves_the_process_as_it_was(checkpoints, photo_folder, tmp_path):
    class Watching(Events):
        def __init__(self) -> None:
            self.seen: set[bool] = set()

        def step(self, **_) -> None:
            self.seen.add(torch.are_deterministic_algorithms_enabled())

    settings = config(checkpoints, photo_folder, tmp_path / "run", max_steps=3)
    plain = train(settings, events=(events := Watching()))
    assert events.seen == {False}
    run = train(settings.replace(deterministic=True, output=str(tmp_path / "other")), events=(events := Watching()))
    assert events.seen == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(adapter_of(run.folder), adapter_of(plain.folder))
