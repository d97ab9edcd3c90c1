"""Packed rows through the linear attention of hybrid models, such as Qwen3.5: the prefix's state is forked.

Such a layer (a gated delta rule, arXiv:2412.06464, after a short causal convolution) sees no mask: it reads a row from
left to right, and all it knows of the past is a state. So a packed row is taken apart at its borders. transformers' own
forward runs on all prefixes, from an empty state, and then on all branches, each from the state that its prefix left;
the results are put back where their tokens stand. Gradients flow back through the states: a prefix gets the sum of its
branches'.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

CHUNK = 64
"""Tokens that the delta rule works on at a time; shorter branches cost as much."""


@dataclass(frozen=True, slots=True)
class Forks:
    """Where the prefixes and branches of a packed batch ``(B, T)`` stand, as places in it when it is flat.

    ``prefixes`` ``(P, L)`` is padded on the left, where an empty state stays empty, and ``mask`` ``(P, L)`` is 0 there.
    Of ``branches`` each is ``(N, L)``, of branches of like length, padded on the right, where padding changes nothing
    that is used; ``owners`` ``(N,)`` are the rows of their prefixes. ``back`` ``(B, T)`` says for each token of the
    batch where its result is, in all rows of prefixes and then of branches, one after the other.
    """

    prefixes: torch.Tensor
    mask: torch.Tensor
    branches: tuple[torch.Tensor, ...]
    owners: tuple[torch.Tensor, ...]
    back: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Forks":
        """The same of tensors changed one by one, such as copies on a device."""
        return Forks(
            change(self.prefixes),
            change(self.mask),
            tuple(map(change, self.branches)),
            tuple(map(change, self.owners)),
            change(self.back),
        )


def find_forks(prefixes: Sequence[range], branches: Sequence[tuple[int, range]], shape: tuple[int, int]) -> Forks:
    """The tables for a batch of this shape. ``branches`` are pairs of a prefix's number and the places of a branch."""
    back = torch.zeros(shape[0] * shape[1], dtype=torch.long)  # padding has the first one's result; nobody looks at it
    width = max(1, *map(len, prefixes))
    table, mask = torch.zeros(len(prefixes), width, dtype=torch.long), torch.zeros(len(prefixes), width)
    for row, places in enumerate(prefixes):
        first = width - len(places)
        table[row, first:] = torch.arange(places.start, places.stop)
        mask[row, first:] = 1
        back[places.start : places.stop] = row * width + first + torch.arange(len(places))
    done, tables, owners = table.numel(), [], []
    for group in _of_like_length(branches):
        # At least two tokens: for one alone upstream overwrites the state in place, by kernels without a gradient.
        width = max(2, *(len(places) for _, places in group))
        rows = torch.zeros(len(group), width, dtype=torch.long)
        for row, (_, places) in enumerate(group):
            rows[row, : len(places)] = torch.arange(places.start, places.stop)
            back[places.start : places.stop] = done + row * width + torch.arange(len(places))
        done += rows.numel()
        tables.append(rows)
        owners.append(torch.tensor([owner for owner, _ in group]))
    return Forks(table, mask, tuple(tables), tuple(owners), back.view(shape))


def _of_like_length(branches: Sequence[tuple[int, range]]) -> list[list[tuple[int, range]]]:
    """The longest first; none is padded to more than twice its length, but for those within a chunk."""
    groups: list[list[tuple[int, range]]] = []
    for branch in sorted(branches, key=lambda branch: len(branch[1]), reverse=True):
        longest = len(groups[-1][0][1]) if groups else 0
        if groups and longest <= max(CHUNK, 2 * len(branch[1])):
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return groups


def fork_states(language_model: Any) -> None:
    """Have its layers of linear attention take ``forks`` (`Forks`), an argument of the language model's forward."""
    for layer in linear_attentions(language_model):
        kernels_on_gpus_alone(sys.modules[type(layer).__module__])
        layer.forward = partial(_forked, layer, layer.forward)


def kernels_on_gpus_alone(modelling: Any) -> None:
    """Have transformers' module of the layers compute by plain torch what is not on a GPU. Once kernels for these
    functions are installed, it gives them whatever comes: a CPU's tensors too, and those that are shapes alone."""
    for name in ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule",
                 "torch_recurrent_gated_delta_rule"):  # fmt: skip
        kernel = getattr(modelling, name)
        if not isinstance(kernel, partial):  # by an earlier call of this
            setattr(modelling, name, partial(_by_device, kernel, inspect.unwrap(kernel)))


def _by_device(kernel: Callable, plain: Callable, values: torch.Tensor, *more: Any, **options: Any) -> Any:
    return (kernel if values.is_cuda else plain)(values, *more, **options)


def linear_attentions(language_model: Any) -> list[Any]:
    """The modules of linear attention; none in models that have none."""
    return [layer.linear_attn for layer in language_model.layers if hasattr(layer, "linear_attn")]


def state_bytes(language_model: Any) -> int:
    """Size of the states of one sequence, in all layers; they are float32, but for the convolution's columns."""
    return sum(
        4 * layer.num_v_heads * layer.head_k_dim * layer.head_v_dim
        + layer.conv_dim * layer.conv_kernel_size * layer.conv1d.weight.itemsize
        for layer in linear_attentions(language_model)
    )


def _forked(
    layer: Any, forward: Callable, hidden_states: torch.Tensor, *, forks: Forks | None = None, **given: Any
) -> torch.Tensor:
    """``(B, T, hidden)``, by two or more runs of the stock ``forward``; by one, where nothing is forked."""
    if forks is None:
        return forward(hidden_states=hidden_states, **given)
    flat = hidden_states.flatten(0, 1)
    name = "cache" if "cache" in given else "cache_params"  # the one since transformers 5.24, the other before

    def run(places: torch.Tensor, mask: torch.Tensor | None, state: Any) -> torch.Tensor:
        rows = flat.index_select(0, places.flatten()).view(*places.shape, -1)
        now = given | {name: _cache_with(state, layer.layer_idx), "attention_mask": mask}
        return forward(hidden_states=rows, **now).flatten(0, 1)

    state = _state_class()()
    done = [run(forks.prefixes, forks.mask, state)]
    for places, owners in zip(forks.branches, forks.owners, strict=True):
        done.append(run(places, None, state.of(owners)))
    return torch.cat(done).index_select(0, forks.back.flatten()).view_as(hidden_states)


def _cache_with(state: Any, layer: int) -> Any:
    from transformers.cache_utils import Cache

    return Cache(layers=[state] * (layer + 1))


@cache
def _state_class() -> Any:
    from transformers.cache_utils import LinearAttentionLayer

    class State(LinearAttentionLayer):
        """What a layer knows of the past, for gradients to pass through: upstream's is overwritten in place."""

        def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **_):
            assert conv_kernel_size
            before = self.conv_states[0]
            if before is None:  # as many empty columns as a branch after a short prefix needs
                before = conv_states.new_zeros(*conv_states.shape[:-1], conv_kernel_size)
            seen = torch.cat([before, conv_states], -1)
            self.conv_states[0] = seen[..., -conv_kernel_size:]
            self.has_previous_state[0] = True
            return seen

        def update_recurrent_state(self, recurrent_states, state_idx=0, **_):
            self.recurrent_states[0] = recurrent_states
            return recurrent_states

        def of(self, owners: torch.Tensor) -> "State":
            """The states of these rows, by number."""
            columns, memory = self.conv_states[0], self.recurrent_states[0]
            assert columns is not None
            assert memory is not None
            other = State()
            other.conv_states[0] = columns.index_select(0, owners)
            other.recurrent_states[0] = memory.index_select(0, owners)
            other.has_previous_state[0] = True
            return other

    return State
