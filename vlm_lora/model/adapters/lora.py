"""LoRA (arXiv:2106.09685) on every linear of the language layers and of the mergers, as a plain PEFT adapter.

QLoRA (arXiv:2305.14314) is the same on a base whose language linears are kept in four bits; `load_backbone`
sees to that. The variants: ``rslora`` scales by alpha over the root of the rank (arXiv:2312.03732), ``dora``
also learns each output's magnitude (arXiv:2402.09353), both PEFT's; ``pissa`` starts from the base's
principal parts (arXiv:2404.02948). PEFT takes these out of the base's weights, so that switched off it would
not be the base; here the base stays whole and the start is subtracted beside it: LoRA of twice the rank, one
half frozen, which is what PEFT itself converts such an adapter to.
"""

import re
import warnings
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.autograd.function import once_differentiable

from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError
from vlm_lora.model.adapters.base import (
    CONFIG,
    WEIGHTS,
    Adapter,
    Contract,
    cannot_be_loaded,
    check_contract,
    read_settings,
    require_none,
)
from vlm_lora.model.backbone import Backbone


def attach_lora(backbone: Backbone, config: TrainConfig, contract: Contract) -> Adapter:
    """Freeze the base and add LoRA; the tensors' first values come from the seed.

    Raises:
        AdapterError: a part of the vision tower would train unasked, or one of the targets is not in the model.
    """
    patterns, targets = backbone.family.linears, config.lora_targets
    halves = 2 if config.variant == "pissa" else 1
    rank, alpha = config.lora_of_projector
    own = "projector" in targets and (rank, alpha) != (config.rank, config.lora_alpha)
    settings = LoraConfig(
        r=halves * config.rank,
        lora_alpha=cast(int, halves * config.lora_alpha),  # any number will do
        lora_dropout=config.dropout,
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        target_modules="|".join(f"(?:{patterns[target]})" for target in targets),
        rank_pattern={patterns["projector"]: halves * rank} if own else {},
        alpha_pattern={patterns["projector"]: halves * alpha} if own else {},
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
        torch.manual_seed(config.seed)
        peft_model = get_peft_model(backbone.model, settings)
    if config.variant == "pissa":
        _start_from_principal_parts(peft_model)
    # The name the user knows it by, which may be the hub's, and not the folder it happened to be loaded from.
    peft_model.peft_config["default"].base_model_name_or_path = backbone.name
    adapter = _adapter(backbone, peft_model, contract)
    _check_trained(adapter, targets)
    return adapter


@torch.no_grad()
def _start_from_principal_parts(peft_model: PeftModel) -> None:
    """The first half of LoRA's rows and columns are the base's largest singular parts, the rest minus the same,
    frozen.
    """
    for module in _lora_layers(peft_model):
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        rank, scaling = len(down) // 2, module.scaling["default"]
        weight = module.get_base_layer().weight
        left, parts, right = torch.linalg.svd(weight.to(down.dtype), full_matrices=False)
        root = (parts[:rank] / scaling).sqrt()
        first = min(rank, len(parts))
        down.zero_()
        up.zero_()
        down[:first] = down[rank : rank + first] = root[:, None] * right[:rank]
        up[:, :first] = left[:, :rank] * root
        up[:, rank : rank + first] = -up[:, :first]
        down.num_trained, up.num_trained = down.numel() // 2, up.numel() // 2
        down.register_hook(lambda grad: torch.cat([grad[: len(grad) // 2], torch.zeros_like(grad[len(grad) // 2 :])]))
        up.register_hook(lambda grad: torch.cat([(half := grad.chunk(2, 1))[0], torch.zeros_like(half[1])], 1))


def _adapter(backbone: Backbone, peft_model: PeftModel, contract: Contract | None) -> Adapter:
    def write(folder: Path) -> None:
        # "auto" would ask the hub whether the vocabulary has changed; embeddings are never trained here.
        peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    for layer in _lora_layers(peft_model):
        linear = isinstance(layer.get_base_layer(), torch.nn.Linear)
        others = layer.lora_variant.keys() - layer.lora_magnitude_vector.keys()  # than DoRA
        if linear and not others and not layer.lora_bias["default"]:
            layer.__class__ = _with(_Lora, type(layer))
    for layer in backbone.language_model.layers:
        for block in layer.children():
            if any(isinstance(each, _Lora) for each in block.children()) and not isinstance(block, _Block):
                block.__class__ = _with(_Block, type(block))
    return Adapter(backbone, contract, peft_model.disable_adapter, write, partial(_fill, backbone, peft_model))


@torch.no_grad()
def _fill(backbone: Backbone, peft_model: PeftModel, folder: Path) -> None:
    """Fill the tensors of an attached adapter from its folder; none may be left over."""
    try:
        saved = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise cannot_be_loaded(folder, error) from error
    own = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    alike = {name for name in saved.keys() & own.keys() if saved[name].shape == own[name].shape}
    require_none((saved.keys() | own.keys()) - alike, folder, backbone)
    set_peft_model_state_dict(peft_model, saved)


def _lora_layers(peft_model: PeftModel) -> list[Any]:
    """PEFT's layers; what they hold by the adapter's name ("default"), a Module's types know nothing of."""
    return [module for module in peft_model.modules() if isinstance(module, LoraLayer)]


def compute_in_base_format(backbone: Backbone, on: bool) -> None:
    """Have LoRA's products computed in the base's format, or in LoRA's own, and not in what suits the device."""
    for layer in backbone.model.modules():
        if isinstance(layer, _Lora):
            layer.in_base_format = on


class _Lora:
    """A layer of PEFT's that computes what its own forward does for one LoRA, in fewer passes; for DoRA in the base's
    format only. By its class, as each layer with a forward of its own would be compiled by itself."""

    in_base_format: bool | None = None
    """Whether LoRA's products are computed in the base's format, and not in LoRA's own; None: as suits the device."""
    given: "_Given | None" = None
    """By the block that it is part of, while that computes."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters:
            return self.base_layer(x)
        dropout, scaling = self.lora_dropout["default"], self.scaling["default"]
        # Without dropout the input itself is kept for the backward pass, which several linears share, not a copy.
        dropped = self.training and not isinstance(dropout, torch.nn.Identity)
        if not _in_base_format(self, x):
            if self.lora_magnitude_vector:
                return super().forward(x)  # type: ignore[misc]  # of the class it is mixed with
            down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
            out = self.base_layer(x)
            seen = dropout(x.to(up.dtype)) if dropped else x
            return _AddLowRank.apply(out.flatten(0, -2), seen.flatten(0, -2), down, up, scaling).view_as(out)
        given = self.given
        if given is None or (given.seen is not None and given.seen is not x):
            ((given,),) = _converted([[self]], x.dtype)
        seen, narrow = given.seen, given.narrow
        if narrow is None:
            seen, (narrow,) = _lowered(dropout(x), given.down, (len(given.down),))
        out = self.base_layer(x if dropped else seen)
        rows = out.flatten(0, -2)
        if given.gain is None:
            return _Raise.apply(rows, narrow, given.up, scaling).view_as(out)
        # DoRA scales what the base makes of the input that LoRA sees, without the bias.
        own, bias = self.base_layer(seen).flatten(0, -2) if dropped else rows, self.base_layer.bias
        own = own if bias is None else own - bias
        rest, gain = (rows, given.gain - 1) if dropped else (bias, given.gain)
        return _Raise.apply(rest, narrow, given.up, scaling, own, gain).view_as(out)


class _Block:
    """Attention or an MLP of the base's with LoRA in it: all of it converted to the base's format in one kernel, and
    one product down for the linears that see one input.

    It is a class, and no hook, as what it gives to its layers must be gone when it is through, also where memory runs
    out: with it, all that the failed pass has kept would stay.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, *more = args or (kwargs.pop("hidden_states"),)
        layers: dict[str, Any] = {name: each for name, each in self._modules.items() if isinstance(each, _Lora)}
        if layers and all(_in_base_format(each, x) and not each.disable_adapters for each in layers.values()):
            x = _give(layers, x)
        try:
            return super().forward(x, *more, **kwargs)  # type: ignore[misc]  # of the class it is mixed with
        finally:
            for each in layers.values():
                each.given = None


OF_ONE_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears of attention, and of an MLP, by their names there: those of a block see what it is given itself."""


class _Given(NamedTuple):
    """LoRA in the base's format; ``narrow`` ``(tokens, r)`` is its product down with the input ``seen``, or not there
    yet. DoRA's ``gain`` ``(outputs,)`` is in ``up`` already."""

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    narrow: torch.Tensor | None = None


def _give(layers: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Give a block's layers what they need beside their input, which is ``x`` for some. Returns ``x``, which the block
    takes from here: the gradient that it brings back is the one that LoRA's is added to."""
    first = [each for name, each in layers.items() if name in OF_ONE_INPUT]
    # Dropout leaves each of them other parts of the input.
    joined = all(isinstance(each.lora_dropout["default"], torch.nn.Identity) for each in first)
    others = [[each] for name, each in layers.items() if not joined or name not in OF_ONE_INPUT]
    groups = [first, *others] if first and joined else others
    given = _converted(groups, x.dtype)
    if first and joined:
        x, parts = _lowered(x, given[0][0].down, [each.up.shape[1] for each in given[0]])
        given[0] = [each._replace(seen=x, narrow=part) for each, part in zip(given[0], parts, strict=True)]
    for layers_of, given_to in zip(groups, given, strict=True):
        for layer, each in zip(layers_of, given_to, strict=True):
            layer.given = each
    return x


@cache
def _with(mixin: type, kind: type) -> type:
    """The class ``kind``, which computes as ``mixin`` does."""
    return type(kind.__name__, (mixin, kind), {})


def _in_base_format(layer: Any, x: torch.Tensor) -> bool:
    """Whether LoRA's products are computed in the base's 16 bits, added up in float32, and not in LoRA's own float32.
    A GPU does: in the language layers of 2B LoRA costs an H200 152 ms for 8,192 tokens in float32, 30 in bfloat16, with
    the same error (bench/results/gpu-profile.json). A CPU gains nothing by it."""
    if layer.in_base_format is not None:
        return layer.in_base_format
    return not x.is_cpu and x.dtype.itemsize < layer.lora_B["default"].weight.dtype.itemsize


def _converted(groups: Sequence[Sequence[Any]], kind: torch.dtype) -> list[list[_Given]]:
    """LoRA of these groups of layers in ``kind``; what is down is one tensor for a group."""
    layers = [layer for group in groups for layer in group]
    downs = [layer.lora_A["default"].weight for layer in layers]
    gains = [_gain(layer) if layer.lora_magnitude_vector else None for layer in layers]
    ups = [layer.lora_B["default"].weight for layer in layers]
    ups = [up if gain is None else gain[:, None] * up for up, gain in zip(ups, gains, strict=True)]
    ranks = tuple(tuple(layer.r["default"] for layer in group) for group in groups)
    converted = _Convert.apply(kind, ranks, *downs, *ups)
    joined, own = converted[: len(groups)], iter(zip(converted[len(groups) :], gains, strict=True))
    return [[_Given(down, *next(own)) for _ in group] for down, group in zip(joined, groups, strict=True)]


def _gain(layer: Any) -> torch.Tensor:
    """DoRA's learnt length of each output's weights over the one that they have with LoRA, which has no gradient
    (section 4.3 of the paper). In float32: a small LoRA would be lost in a sum in the base's format."""
    learnt, down, up = (each["default"].weight for each in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B))
    with torch.no_grad():
        weight = dequantize_module_weight(layer.base_layer).to(learnt.dtype, copy=True)
        weight.addmm_(up, down, alpha=layer.scaling["default"])
    return learnt / torch.linalg.vector_norm(weight, dim=1)


def _lowered(x: torch.Tensor, down: torch.Tensor, ranks: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``x`` for the base to see, and its product down, cut into parts of these ranks."""
    seen, *parts = _Lower.apply(x.flatten(0, -2), down, ranks)
    return seen.view_as(x) if x.requires_grad else x, parts


class _Convert(torch.autograd.Function):
    """LoRA's tensors in another format, and their gradients back, each way in one kernel for all: first the ways down,
    those of each group's ``ranks`` laid one below the other; then the ways up."""

    @staticmethod
    def forward(
        ctx: Any, kind: torch.dtype, ranks: tuple[tuple[int, ...], ...], *own: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.ranks, ctx.own = ranks, own[0].dtype
        downs, parts = [], []
        for group in ranks:
            downs.append(own[len(parts)].new_empty((sum(group), own[len(parts)].shape[1]), dtype=kind))
            parts += downs[-1].split(group)
        ups = [torch.empty_like(up, dtype=kind) for up in own[len(parts) :]]
        torch._foreach_copy_([*parts, *ups], own)  # pyright: ignore[reportPrivateImportUsage]
        return *downs, *ups

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        joined, ups = grads[: len(ctx.ranks)], grads[len(ctx.ranks) :]
        found = [part for grad, group in zip(joined, ctx.ranks, strict=True) for part in grad.split(group)]
        found += ups
        own = [torch.empty_like(each, dtype=ctx.own) for each in found]
        torch._foreach_copy_(own, found)  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *own


class _Lower(torch.autograd.Function):
    """``x`` ``(tokens, width)`` itself, and ``x @ down.T`` in parts of these ``ranks``.

    As ``x`` goes through it, so does the gradient that the base's linears give it, and LoRA's is added by the product
    that makes it, without a pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, ranks: Sequence[int]) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, down)
        return x.view_as(x), *F.linear(x, down).split(ranks, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_seen, *of_parts = grads
        x, down = ctx.saved_tensors
        back = torch.cat(of_parts, 1) if len(of_parts) > 1 else of_parts[0]
        return torch.addmm(of_seen, back, down) if ctx.needs_input_grad[0] else None, back.T @ x, None


class _Raise(torch.autograd.Function):
    """``out + scaling * narrow @ up.T``, scaled and added by the product; in ``out``'s format, each rounded once.

    For DoRA ``out + gain * own`` stands in the place of ``out``, which is a bias then, or as large as ``own``, or None;
    ``gain`` ``(outputs,)`` stays in float32, as near 1 bfloat16 has steps of 0.8 %.
    """

    @staticmethod
    def forward(ctx: Any, out: Any, narrow, up, scaling: float, *scaled: torch.Tensor) -> torch.Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(narrow, up, *scaled)
        if not scaled:
            return torch.addmm(out, narrow, up.T, alpha=scaling)
        own, gain = scaled
        total = torch.empty_like(own)
        torch.mul(own, gain, out=total) if out is None else torch.addcmul(out, own, gain, out=total)
        return total.addmm_(narrow, up.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        narrow, up, *scaled = ctx.saved_tensors
        of_scaled = ()
        if scaled:
            own, gain = scaled
            of_scaled = torch.mul(grad, gain, out=torch.empty_like(grad)), (grad * own).sum(0, dtype=gain.dtype)
        of_out = grad if ctx.needs_input_grad[0] else None
        return of_out, _product(grad, up, ctx.scaling), _product(grad.T, narrow, ctx.scaling), None, *of_scaled


def _product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``scaling * a @ b``, scaled before it is rounded."""
    return torch.addmm(a.new_empty(len(a), b.shape[1]), a, b, beta=0, alpha=scaling)


class _AddLowRank(torch.autograd.Function):
    """``out + scaling * x @ down.T @ up.T`` in few passes over tensors as wide as the layer: scaled where it is narrow,
    added by the matrix product that makes it; and backward the gradient of ``up`` as the product of a narrow by a wide
    matrix, which on a CPU takes a ninth of the time of autograd's, that of a wide one by a narrow.

    Products are in LoRA's own float32. Over a base in bfloat16 it adds in float32, too, and gives bfloat16. So does
    PEFT, but over four bits, where it rounds before it adds.
    """

    @staticmethod
    def forward(ctx: Any, out, x, down, up, scaling: float) -> torch.Tensor:
        ctx.scaling = scaling
        narrow = scaling * F.linear(x.to(up.dtype), down)
        ctx.save_for_backward(x, narrow, down, up)
        total = out.to(up.dtype)
        total = torch.addmm(out, narrow, up.T) if total is out else total.addmm_(narrow, up.T)
        # Not by a `to` that does nothing: compiled by torch 2.11, its result has no gradient.
        return total if up.dtype == out.dtype else total.to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, narrow, down, up = ctx.saved_tensors
        wide = grad.to(up.dtype)
        # At rank 8 a CPU takes twice as long for `wide @ up`.
        back = ctx.scaling * F.linear(wide, up.T.contiguous() if wide.is_cpu else up.T)
        of_up = (narrow.T @ wide).T
        del wide  # of the float32 copies over a base in bfloat16, one at a time
        of_down = back.T @ x.to(up.dtype)
        of_x = (back @ down).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad, of_x, of_down, of_up, None


def _check_trained(adapter: Adapter, targets: Sequence[str]) -> None:
    """Raises `AdapterError` unless LoRA sits in each of ``targets``, and nothing else trains."""
    family, trained = adapter.backbone.family, [name for name, _ in adapter.named_parameters()]
    frozen = () if "vision" in targets else family.tower_prefixes
    strays = [name for name in trained if name.startswith(frozen) or ".lora_" not in name]
    if strays:
        raise AdapterError(f"{len(strays)} tensors would train that must not, first {strays[0]}.")
    for target in targets:
        if not any(re.match(family.linears[target], name) for name in trained):
            raise AdapterError(
                f"No linear layer of the {target} was found to adapt in {adapter.backbone.name}: nothing "
                "there would be learnt. This is not a checkpoint layout that vlm-lora knows."
            )


def load_lora(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved adapter, ready for inference.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, or any key is without its counterpart.
    """
    config = read_settings(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; expected 'LORA'.")
    if config.get("megatron_config"):
        raise AdapterError(f"{folder / CONFIG}: asks for a module to be imported (megatron_config); refused.")
    contract = check_contract(backbone, folder)
    if contract and contract.method == "qlora" and not backbone.quantised:
        raise AdapterError(f"{folder}: was trained by --method qlora; the base is loaded unquantised.")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of unmatched keys; they are an error below
            peft_model = PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=False)
    except Exception as error:  # PEFT raises nearly anything for a configuration that it cannot use
        raise cannot_be_loaded(folder, error) from error
    require_none(saved ^ set(get_peft_model_state_dict(peft_model, save_embedding_layers=False)), folder, backbone)
    peft_model.eval()
    return _adapter(backbone, peft_model, contract)
