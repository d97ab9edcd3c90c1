"""What one pass costs, traced: the very code that trains, on tensors that have shapes and no values.

The model is cut down to one or two layers of each kind. What a layer costs is what one more of it adds, so the whole
model's cost is a sum, whatever the family, the method and the number format: none of them has a formula here.
"""

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.lora import compute_in_base_format
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.families import PARTS, part_of
from vlm_lora.model.folder import find_model
from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, pack_apart
from vlm_lora.model.shapes import layer_kinds, load_shapes, num_inner_layers, num_numbers
from vlm_lora.training.batches import MicroBatch
from vlm_lora.training.step import loss_sum

aten = torch.ops.aten

MEMORY_ONLY = ("empty", "new_empty", "lift", "_local_scalar")
"""Operators that start no kernel, by what their names begin with."""

PICKS_ROWS = ("embedding", "index", "index_select", "gather")
"""Operators that read no more of their first input than they give."""


class Kernel(NamedTuple):
    """One operator as a device runs it: its arithmetic, and the bytes that it reads and writes."""

    name: str
    dtype: torch.dtype
    operations: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Traced:
    """What a pass does. ``kernels``: how often each runs. In bytes, without weights and what trains: ``kept`` until
    the backward pass, and the ``peak`` of all that is held."""

    kernels: Counter[Kernel]
    kept: float
    peak: float

    @property
    def operations(self) -> float:
        return sum(kernel.operations * times for kernel, times in self.kernels.items())

    @property
    def num_kernels(self) -> float:
        return sum(self.kernels.values())


def weighted_sum(parts: Iterable[tuple[int, Traced]]) -> Traced:
    """The sum of traces, each so many times."""
    parts = list(parts)
    kernels: Counter[Kernel] = Counter()
    for times, traced in parts:
        for kernel, count in traced.kernels.items():
            kernels[kernel] += times * count
    sizes = (sum(times * getattr(t, name) for times, t in parts) for name in ("kept", "peak"))
    return Traced(Counter({kernel: count for kernel, count in kernels.items() if count}), *sizes)


# ---- counting -----------------------------------------------------------------------------------------------------


class Trace(TorchDispatchMode):
    """Counts the operators that run inside, and the bytes of what they made and is still there.

    Tensors of numbers are on the meta device. Those of whole numbers (places, grids, window tables) stay on the CPU
    with their values, as some of the code asks for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = list(_tensors((*args, *kwargs.values())))
        shapes = [each.is_meta for each in inputs]
        if "device" in kwargs and not any(shapes) and torch.device(kwargs["device"] or "cpu").type == "meta":
            dtype = kwargs.get("dtype") or (inputs[0].dtype if inputs else torch.get_default_dtype())
            if not dtype.is_floating_point:
                kwargs["device"] = "cpu"
        if any(shapes) and not all(shapes):
            args, kwargs = tree_map_only(torch.Tensor, _as_shape, (args, kwargs))
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        if any(shapes) or any(each.is_meta for each in outputs):
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list, outputs: list) -> None:
        known = {each.untyped_storage()._cdata for each in inputs}
        new = False
        for each in outputs:
            storage = each.untyped_storage()
            if storage._cdata not in known:
                new = True
                known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        name = func._schema.name.split("::")[1]
        if name.startswith(MEMORY_ONLY) or not (new or func._schema.is_mutable):
            return  # a view
        written = sum(each.nbytes for each in outputs)
        read = written if name in PICKS_ROWS else sum(each.nbytes for each in inputs if each is not kwargs.get("out"))
        count = OPERATIONS.get(func._overloadpacket)
        operations = count(*args, **kwargs, out_val=out) if count else 0
        dtype = next((each.dtype for each in (*inputs, *outputs) if each.dtype.is_floating_point), torch.int64)
        self.kernels[Kernel(name, dtype, operations, read + written)] += 1

    def _freed(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among the values, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _as_shape(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _attention_operations(queries: Any, keys: Any, products: int) -> int:
    """Of so many matrix products of attention, from tensors or their shapes. torch's own formula, before 2.13, refuses
    keys of fewer heads than queries."""
    rows, heads, length, width = getattr(queries, "shape", queries)
    return 2 * products * rows * heads * length * getattr(keys, "shape", keys)[2] * width


ATTENTION_OPERATIONS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: _attention_operations(q, k, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: _attention_operations(
        q, k, 5
    ),
}
"""Of the CPU's kernel, which torch's own table of operations leaves out."""

OPERATIONS: dict[Any, Callable[..., int]] = flop_registry | ATTENTION_OPERATIONS
"""By operator; of a multiply-add two."""


class _FusedAttention(TorchFunctionMode):
    """Attention by one kernel that keeps its inputs, its output and a sum for each row, as on every device that trains.
    By itself the meta device takes the formula apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with _FusedAttention():
        return forward(*args, **kwargs)


def _attend(  # arguments: those of torch's own function
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# ---- a pass of the training loop, and of the tower ----------------------------------------------------------------


class MicroShape(NamedTuple):
    """``rows`` of ``width`` tokens, the first ``prefix`` of each before its ``branches``; how many tokens of all carry
    loss; patches of each image in them."""

    rows: int
    width: int
    prefix: int
    branches: int
    labels: int
    patches: tuple[int, ...]


class TracedModel:
    """A base model of shapes alone, with an adapter on it: traces of its passes, and how many numbers it has.

    ``device`` is the type of the one that is to train it: "cpu" or "cuda".
    """

    def __init__(self, config: TrainConfig, dtype: torch.dtype, device: str):
        config = config.replace(model=str(find_model(config.model, weights=False)))  # the hub is asked once
        kinds = layer_kinds(config.model)
        # A layer of each kind, and all that are shown an inner layer of the tower.
        shown = num_inner_layers(config.model)
        shortest = next(n for n in range(1, len(kinds) + 1) if {*kinds[:n]} == {*kinds} and n >= shown)
        more = Counter(kinds[shortest:])
        base = _attached(config, dtype, device, kinds[:shortest])
        self._cut = [(1 - more.total(), base)]
        self._cut += [
            (times, _attached(config, dtype, device, (*kinds[:shortest], kind))) for kind, times in more.items()
        ]
        self._base, self.num_layers = base, len(kinds)
        self.tower_adapted = base.backbone.tower_adapted
        self.feature_bytes = base.backbone.feature_width * dtype.itemsize
        """Of a patch."""

    def step(self, shape: MicroShape, learns: bool = True) -> Traced:
        """The forward pass of a micro-batch, after the tower, and the backward pass where it ``learns``."""
        return weighted_sum((times, trace_step(adapter, shape, learns)) for times, adapter in self._cut)

    @cached_property
    def trained(self) -> int:
        """Numbers that train."""
        return sum(times * sum(p.numel() for _, p in adapter.named_parameters()) for times, adapter in self._cut)

    @cached_property
    def language_weights(self) -> int:
        """Numbers of the base's language linears."""
        pattern = re.compile(self._base.backbone.family.linears["language"] + r"(?:\.base_layer|\.base)?\.weight")
        return sum(
            times * num_numbers(parameter)
            for times, adapter in self._cut
            for name, parameter in adapter.backbone.model.named_parameters()
            if pattern.fullmatch(name)
        )

    @cached_property
    def frozen_bytes(self) -> dict[str, int]:
        """Of the base's weights, by the part of the model."""
        sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
        for times, adapter in self._cut:
            for name, parameter in adapter.backbone.model.named_parameters():
                sizes[part_of(name)] += times * (0 if parameter.requires_grad else _num_bytes(parameter))
        return sizes

    def tower(self, patches: Sequence[int]) -> Traced:
        """The forward pass of images of so many patches, and the backward pass where an adapter sits in the tower."""
        return trace_tower(self._base, patches)


def _num_bytes(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of a weight in four bits
    return parameter.nbytes + (state.absmax.nbytes + state.state2.absmax.nbytes if state else 0)


def _attached(config: TrainConfig, dtype: torch.dtype, device: str, layers: Sequence[str]) -> Adapter:
    backbone = load_shapes(config.model, dtype=dtype, layers=layers, quantised=config.method == "qlora")
    for layer in backbone.language_model.layers:  # each, as a layer that runs again in the backward pass is by itself
        layer.forward = partial(_fused, layer.forward)
    with Trace():  # prefix and prompt start from words, whose numbers are looked at
        adapter = attach_adapter(backbone, config)
    if device == "cpu":
        compute_in_base_format(backbone, False)
    if config.gradient_checkpointing:
        backbone.checkpoint_layers()
    backbone.model.train()
    for _, parameter in adapter.named_parameters():
        parameter.grad = torch.empty_like(parameter)  # it is there from the second micro-batch on
    return adapter


def trace_step(adapter: Adapter, shape: MicroShape, learns: bool = True) -> Traced:
    """The pass of a micro-batch of this shape by the model that is there; forward alone unless it ``learns``."""
    backbone = adapter.backbone
    batch = micro_batch(backbone, shape)
    with Trace() as trace, torch.set_grad_enabled(learns):
        loss = loss_sum(backbone, batch)
        kept = trace.live
        if loss.requires_grad:
            loss.backward()
    return Traced(trace.kernels, kept, trace.peak)


def trace_tower(adapter: Adapter, patches: Sequence[int]) -> Traced:
    """The pass of these images together, each as good as square."""
    backbone, cell = adapter.backbone, adapter.backbone.merge_size
    grids = []
    for count in patches:
        high = max(1, round(math.sqrt(count) / cell)) * cell
        grids.append((1, high, max(1, round(count / high / cell)) * cell))
    pixels = torch.empty(sum(map(math.prod, grids)), backbone.patch_numbers, device="meta")
    grid = torch.tensor(grids)
    with Trace() as trace, _FusedAttention():
        if not backbone.tower_adapted:
            backbone.tower(pixels, grid)
            return Traced(trace.kernels, 0, trace.peak)
        features = backbone._through_tower(pixels, grid)
        kept = trace.live
        features.backward(torch.empty_like(features))
    return Traced(trace.kernels, kept, trace.peak)


def micro_batch(backbone: Backbone, shape: MicroShape) -> MicroBatch:
    """A micro-batch of this shape on the model's device, of tokens that say nothing."""
    device = backbone.device
    cell = backbone.merge_size**2
    # As even as can be: a row's prefix has room for the mean, and none is known to have room for more.
    each, over = divmod(sum(shape.patches) // cell, shape.rows)
    images = [each + (row < over) for row in range(shape.rows)]
    token = backbone.image_token_id
    rows, labels = [], shape.labels
    branches, lengths = -(-shape.branches // shape.rows), shape.width - shape.prefix
    for shown in images:
        prefix = torch.zeros(shape.prefix, dtype=torch.long)
        prefix[:shown] = token
        shown -= min(shown, shape.prefix)  # what stands after the first difference is in branches
        tails = []
        for start in range(branches):
            length = lengths // branches + (start < lengths % branches)
            answer = torch.full((length,), IGNORE_INDEX)
            learnt = min(labels, length - 1)
            answer[length - learnt :] = 0
            labels -= learnt
            said = torch.zeros(length, dtype=torch.long)
            said[:shown] = token
            shown -= min(shown, length)
            tails.append(Branch(said, answer))
        rows.append(Encoded(prefix, torch.arange(shape.prefix).expand(3, -1), tuple(tails)))
    packed = pack_apart(rows, 0)
    width = backbone.feature_width
    features = torch.empty(sum(shape.patches), width, dtype=backbone.dtype, device=device) if shape.patches else None
    if features is not None and backbone.tower_adapted:
        features.requires_grad_()
    placed = packed.position_ids.to(device), packed.attention_mask.to(device)
    return MicroBatch(packed.input_ids, packed.labels, *placed, features, shape.labels, packed.forks)
