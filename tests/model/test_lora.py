"""The faster forward of LoRA and DoRA is PEFT's own, in value and gradient.

Run: pytest tests/model/test_lora.py
"""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters import lora
from vlm_lora.model.adapters.lora import _Lora, compute_in_base_format
from vlm_lora.model.adapters.methods import attach_adapter, load_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.training.step import loss_sum
from vlm_lora.training.trace import MicroShape, TracedModel, micro_batch


@pytest.fixture(scope="module", params=["plain", "plain, dropout", "dora", "dora, dropout"])
def backbone(checkpoints, request):
    variant, *dropped = request.param.split(", ")
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    attach_adapter(
        backbone, TrainConfig(data="none", rank=4, alpha=7, dropout=0.3 * len(dropped), variant=variant, seed=1)
    )
    return backbone


@pytest.fixture(params=["mlp.gate_proj", "self_attn.k_proj"])  # without and with a bias
def layer(backbone, request):
    layer = backbone.language_model.layers[0].get_submodule(request.param)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    for magnitude in layer.lora_magnitude_vector.values():
        torch.nn.init.uniform_(magnitude.weight, 0.5, 1.5)
    return layer.train()


def lora_of(layer) -> list[torch.nn.Parameter]:
    """A and B, and DoRA's magnitudes."""
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]


def outcome(layer, forward, tokens: int = 6) -> list[torch.Tensor]:
    """Output and gradients of input, and of all that trains."""
    layer.zero_grad()
    torch.manual_seed(5)  # dropout
    x = torch.randn(2, tokens // 2, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.base_layer.weight.dtype).requires_grad_()
    out = forward(x)
    out.square().sum().backward()
    return [out.detach().double(), *(each.grad.double() for each in (x, *lora_of(layer)))]


@pytest.mark.parametrize(("base", "lora", "tolerance"), [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.float32, 4e-3),  # half a step of bfloat16: what lies between two is rounded either way
])  # fmt: skip
def test_it_is_pefts(layer, base, lora, tolerance):
    layer.to(lora)
    layer.base_layer.to(base)
    assert isinstance(layer, _Lora)  # else both are the same
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
    layer.float().base_layer.bfloat16()
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=size, generator=torch.Generator().manual_seed(3))
    theirs = outcome(layer, lambda x: Linear.forward(layer, x))
    monkeypatch.setattr(layer, "in_base_format", True)
    ours = outcome(layer, layer)
    assert {each.grad.dtype for each in lora_of(layer)} == {torch.float32}
    monkeypatch.setattr(layer, "in_base_format", False)

    layer.double()  # the base's values stay those of bfloat16
    exact = outcome(layer, layer)
    within = 3 if layer.lora_magnitude_vector else 2.5  # DoRA rounds the gain's product too
    for mine, other, expected in zip(ours, theirs, exact, strict=True):
        off, usual = ((each - expected).norm() / expected.norm() for each in (mine, other))
        assert off < within * usual
    layer.scaling["default"] *= 1.1  # negative control
    assert (outcome(layer, layer)[2] - exact[2]).norm() / exact[2].norm() > 0.02
    layer.scaling["default"] /= 1.1


@pytest.mark.parametrize("backbone", ["dora", "dora, dropout"], indirect=True)
def test_dora_in_bfloat16_is_more_right_than_pefts_in_bfloat16(layer, monkeypatch):
    """In output and every gradient, over many tokens: what is as small as LoRA is in float32, also its lengths."""
    layer.float().base_layer.bfloat16()
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=torch.Generator().manual_seed(3))
    narrow = copy.deepcopy(layer).bfloat16()
    theirs = outcome(narrow, lambda x: Linear.forward(narrow, x), tokens=120)
    exact = copy.deepcopy(layer).double()
    exact = outcome(exact, exact, tokens=120)
    monkeypatch.setattr(layer, "in_base_format", True)

    def less_right() -> list[bool]:
        ours = outcome(layer, layer, tokens=120)
        found = zip(ours, theirs, exact, strict=True)
        return [bool((mine - best).norm() >= (other - best).norm()) for mine, other, best in found]

    assert less_right() == [False] * 5
    right = lora._gain
    monkeypatch.setattr(lora, "_gain", lambda each: 1.01 * right(each))  # negative control
    assert any(less_right())


def test_it_learns_from_an_input_that_wants_no_gradient(layer):
    layer.float()(torch.randn(2, 3, layer.in_features)).sum().backward()
    assert all(each.grad.norm() > 0 for each in lora_of(layer))


def test_switched_off_it_is_the_base(layer):
    layer.float()
    x = torch.randn(1, 2, layer.in_features)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), layer.base_layer(x))


# -- several linears of one input: one product down ------------------------------------------------------------------

SHAPE = MicroShape(2, 40, 24, 4, 12, (16, 16))


def shaken(backbone) -> dict[str, torch.nn.Parameter]:
    """LoRA's tensors, trained and zero nowhere."""
    tensors = {name: p for name, p in backbone.model.named_parameters() if ".lora_" in name}
    for i, tensor in enumerate(tensors.values()):
        numbers = torch.Generator().manual_seed(i)
        tensor.data = 0.1 * torch.randn(tensor.shape, generator=numbers).to(tensor.dtype)
        tensor.requires_grad_()
    backbone.model.train()
    return tensors


def learnt(backbone, batch) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every tensor."""
    backbone.model.zero_grad()
    torch.manual_seed(5)  # dropout
    loss = loss_sum(backbone, batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad}


def of_some_linears(checkpoints, folder):
    """A base with an adapter of PEFT's, of other ranks for some and none for others, that it has written itself."""
    settings = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=r"model\.language_model.*\.(?:q_proj|v_proj|up_proj|down_proj)",
        rank_pattern={"v_proj": 3, "down_proj": 5},
        init_lora_weights=False,
    )
    base = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    get_peft_model(base.model, settings).save_pretrained(folder)
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    load_adapter(backbone, folder)
    return backbone


def attached(checkpoints, family="qwen2_vl", quantise=False, **changes):
    backbone = load_backbone(str(checkpoints[family]), dtype="float32", quantise=quantise)
    method = "qlora" if quantise else "lora"
    attach_adapter(backbone, TrainConfig(data="none", method=method, rank=4, alpha=7, seed=1, **changes))
    if changes.get("gradient_checkpointing"):
        backbone.checkpoint_layers()
    return backbone


@pytest.mark.parametrize(("made", "groups"), [
    ({}, 4),
    ({"dropout": 0.3}, 7),  # none sees what another sees
    ({"gradient_checkpointing": True}, 8),
    ({"variant": "pissa"}, 4),
    ({"variant": "dora"}, 4),
    ({"variant": "dora", "dropout": 0.3}, 7),
    ({"variant": "dora", "quantise": True}, 4),
    ({"variant": "dora", "quantise": True, "dropout": 0.3}, 7),
    ({"targets": "language"}, 4),
    ({"quantise": True}, 4),
    ({"family": "qwen3_vl"}, 4),
    ("some linears", 3),
    ("hooked", 5),  # a hook gives one of three another tensor
], ids=str)  # fmt: skip
def test_one_product_down_is_as_good_as_many(checkpoints, tmp_path, monkeypatch, made, groups):
    """In loss and every gradient, also where it cannot be for all; and how many products down a layer then has."""
    backbone = of_some_linears(checkpoints, tmp_path) if made == "some linears" else None
    backbone = backbone or attached(checkpoints, **({} if made == "hooked" else made))
    layers = backbone.language_model.layers
    if made == "hooked":
        for layer in layers:
            layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1,))
    if not backbone.quantised:
        backbone.model.double()
    shaken(backbone)
    torch.manual_seed(0)
    batch = micro_batch(backbone, SHAPE)
    batch.images.normal_()
    compute_in_base_format(backbone, False)
    apart = learnt(backbone, batch)
    compute_in_base_format(backbone, True)
    products, right = [], lora._lowered
    monkeypatch.setattr(lora, "_lowered", lambda *given: products.append(1) or right(*given))
    joined = learnt(backbone, batch)
    projector = sum(isinstance(each, _Lora) for each in backbone.model.model.visual.modules())
    assert len(products) == groups * len(layers) + projector
    within = 1e-5 if backbone.quantised else 1e-12

    def differing() -> list[str]:
        return [name for name in apart if not (joined[name] - apart[name]).norm() <= within * apart[name].norm()]

    assert differing() == []

    def swapped(*given):  # negative control
        seen, parts = right(*given)
        return seen, parts if len({part.shape for part in parts}) > 1 else parts[::-1]

    monkeypatch.setattr(lora, "_lowered", swapped)
    joined = learnt(backbone, batch)
    assert bool(differing()) == (groups in (4, 5, 8))  # where several of the same rank are joined


@pytest.mark.parametrize("kind", ["self_attn", "mlp"])
def test_joined_in_bfloat16_it_is_as_right_as_pefts_float32(checkpoints, monkeypatch, kind):
    """As above, for a block: what it gives, and the gradients of its input and of all its LoRA."""
    backbone = attached(checkpoints)
    block = backbone.language_model.layers[0].get_submodule(kind)
    tensors = shaken(backbone)
    own = [tensor for name, tensor in tensors.items() if f"layers.0.{kind}." in name]
    x = torch.randn(2, 30, backbone.language_model.norm.weight.numel(), generator=torch.Generator().manual_seed(0))
    angles = backbone.language_model.rotary_emb(x, torch.arange(30).expand(3, 2, -1))

    def outcome(dtype: torch.dtype) -> list[torch.Tensor]:
        seen = x.bfloat16().to(dtype).requires_grad_()
        more = {"position_embeddings": [a.bfloat16().to(dtype) for a in angles], "attention_mask": None}
        out = block(hidden_states=seen, **more)[0] if kind == "self_attn" else block(seen)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        return [each.double() for each in (out.detach(), *torch.autograd.grad(out, (seen, *own), weights))]

    for each in block.modules():
        if isinstance(each, _Lora):
            each.base_layer.bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(_Lora, "forward", lambda self, x: Linear.forward(self, x))
        theirs = outcome(torch.bfloat16)
    compute_in_base_format(backbone, True)
    ours = outcome(torch.bfloat16)
    compute_in_base_format(backbone, False)
    block.double()  # the base's values stay those of bfloat16
    exact = outcome(torch.float64)
    for mine, other, expected in zip(ours, theirs, exact, strict=True):
        off, usual = ((each - expected).norm() / expected.norm() for each in (mine, other))
        assert off < 2.5 * usual
    for layer in block.children():  # negative control
        if isinstance(layer, _Lora):
            layer.scaling["default"] *= 1.1
    assert (outcome(torch.float64)[2] - exact[2]).norm() / exact[2].norm() > 0.02


def test_a_pass_that_fails_leaves_nothing_that_it_has_kept(checkpoints, monkeypatch):
    backbone = attached(checkpoints)
    compute_in_base_format(backbone, True)
    shaken(backbone)
    layer = backbone.language_model.layers[1]
    kept = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(layer.mlp.up_proj.given.narrow))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(layer.mlp.up_proj.base_layer, "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        loss_sum(backbone, micro_batch(backbone, SHAPE))
    gc.collect()
    assert kept[0]() is None


def per_layer(checkpoints, device: str, width: int, **changes) -> Counter:
    """Kernels that a layer starts over a base in bfloat16; a CPU's LoRA is in float32, and its DoRA PEFT's own."""
    config = TrainConfig(data="x", model=str(checkpoints["qwen2_vl"]), rank=4, **changes)
    traced = TracedModel(config, torch.bfloat16, device)
    step = traced.step(MicroShape(2, width, 24, 4, 12, (16, 16))).kernels
    return Counter({kernel: times // traced.num_layers for kernel, times in step.items()})


def added(more: Counter, less: Counter) -> dict[str, int]:
    """How many more kernels of each name."""
    names: Counter = Counter()
    for kernels, sign in ((more, 1), (less, -1)):
        for kernel, times in kernels.items():
            names[kernel.name] += sign * times
    return {name: times for name, times in names.items() if times}


def test_what_lora_of_a_layer_costs_a_gpu(checkpoints, monkeypatch):
    """Kernels, counted, so that they do not grow."""

    def started() -> dict[str, int]:
        return added(per_layer(checkpoints, "cuda", 40), per_layer(checkpoints, "cuda", 40, targets="projector"))

    # Down and its gradient 2 x 4; up, and its two gradients, 3 x 7; what x gets of the four inputs.
    expected = {"_foreach_copy_": 4, "mm": 2 * 4, "addmm": 3 * 7 + 4, "cat": 2, "add_": 2 * 7}
    assert started() == expected
    monkeypatch.setattr(lora, "OF_ONE_INPUT", ())  # negative control
    assert sum(started().values()) > sum(expected.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_dora_of_a_layer_costs_a_gpu(checkpoints, dropout):
    """Beside LoRA, and beside PEFT's own way: kernels, and the bytes that a token more adds to them."""
    settings = {"dropout": dropout, "targets": "language"}

    def grown(device: str, variant: str, *formats: torch.dtype) -> int:
        narrow, wide = (per_layer(checkpoints, device, width, variant=variant, **settings) for width in (40, 41))
        wide.subtract(narrow)
        return sum(times * kernel.num_bytes for kernel, times in wide.items() if kernel.dtype in formats)

    lora_in, ours, theirs = (
        per_layer(checkpoints, device, 40, variant=variant, **settings)
        for device, variant in (("cuda", "plain"), ("cuda", "dora"), ("cpu", "dora"))
    )
    found = added(ours, lora_in)
    # The sum with the base and its lengths; the gain, and it in the way up, there and back; and with it the output
    # (three of seven have a bias), its gradient, and the gain's.
    lengths = {"_to_copy": 7, "linalg_vector_norm": 7, "div": 2 * 7, "add_": 7}
    assert found.items() >= lengths.items()
    if not dropout:
        scaled = {
            "mul": 3 * 7 + 4 + 2 * 7,
            "sub": 3,
            "addcmul": 3,
            "addmm": -7,
            "addmm_": 2 * 7,
            "sum": 2 * 7,
            "add": 7,
        }
        assert found == lengths | scaled
    assert 1.5 * sum(found.values()) < sum(added(theirs, lora_in).values())

    both = torch.float32, torch.bfloat16
    of_lora = grown("cuda", "plain", *both)
    assert 6 * (grown("cuda", "dora", *both) - of_lora) < grown("cpu", "dora", *both) - of_lora
    # Nothing that has a row for each token is in float32.
    in_float32 = [grown(*way, torch.float32) for way in (("cuda", "plain"), ("cuda", "dora"), ("cpu", "dora"))]
    assert in_float32[0] == in_float32[1] < in_float32[2]
