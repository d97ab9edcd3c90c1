"""One step: its loss, its gradients, the update of the adapter.

The loss of a step is the sum over its labelled tokens divided by their number over all micro-batches and processes,
so every answer's tokens weigh the same however the step is cut up. A weight in the data multiplies an answer's part of
that sum and leaves the number as it is, as in ms-swift.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vlm_lora.config import TrainConfig
from vlm_lora.errors import TrainingError
from vlm_lora.model.adapters.base import PARTS, part_of
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.device import is_out_of_memory
from vlm_lora.model.packing import IGNORE_INDEX
from vlm_lora.training.batches import (
    Fetched,
    Loader,
    MicroBatch,
    count_labels,
    largest_micro_batch,
)
from vlm_lora.training.checkpoint import Progress
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.processes import Processes

SCORED_AT_ONCE = 64
"""Held-out examples of each process that are fetched together."""

LOGITS_AT_ONCE = 1024
"""Labelled tokens whose logits are held at a time; more are computed in chunks and again in the backward pass."""

OUT_OF_MEMORY = (
    "Out of memory, and there is nothing left to halve. Give a smaller --max-pixels (fewer tokens an image) or "
    "--micro-batch-tokens, --gradient-checkpointing, --dtype bfloat16, --method qlora, or a smaller base with --model."
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and gradient norm of a step, over all processes. Not finite: nothing was applied."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def overflowed(self) -> bool:
        """The loss is a number, but its gradients are too large for their format."""
        return math.isfinite(self.loss) and not math.isfinite(self.grad_norm)


# ---- loss ---------------------------------------------------------------------------------------------------------


def loss_sum(backbone: Backbone, batch: MicroBatch, label_logits: bool = True) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens; logits are computed where there are labels, or else everywhere."""
    rows = (batch.input_ids, batch.attention_mask, batch.position_ids)
    hidden = backbone.forward(*rows, batch.images, forks=batch.forks)
    if not label_logits:
        targets = batch.labels[:, 1:].flatten().to(hidden.device)
        weights = None if batch.weights is None else batch.weights[:, 1:].flatten().to(hidden.device)
        return _cross_entropy(backbone, hidden[:, :-1].flatten(0, 1), targets, weights)
    # Found on the CPU, where labels are kept: a GPU's answer to how many there are would have to be waited for.
    targets = batch.labels[:, 1:]
    places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    weights = None if batch.weights is None else batch.weights[:, 1:][places].to(hidden.device, non_blocking=True)
    targets = targets[places].to(hidden.device, non_blocking=True)
    hidden = hidden[tuple(place.to(hidden.device, non_blocking=True) for place in places)]
    if len(targets) <= LOGITS_AT_ONCE:
        return _cross_entropy(backbone, hidden, targets, weights)
    parts = [None] * len(targets) if weights is None else weights.split(LOGITS_AT_ONCE)
    chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), parts, strict=False)
    losses = [checkpoint(_cross_entropy, backbone, h, t, w, use_reentrant=False) for h, t, w in chunks]
    return torch.stack(losses).sum()


def _cross_entropy(
    backbone: Backbone, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    logits = backbone.logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    return (F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX) * weights).sum()


@torch.no_grad()
def mean_loss(
    loader: Loader,
    examples: Sequence[Lesson],
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Loss per labelled token over all examples, nan if none is left; leaves weights and random state as they are.

    ``progress`` is called in every process with how many are done, after each `SCORED_AT_ONCE`; it may raise.
    """
    backbone, processes = loader.backbone, loader.processes
    training = backbone.model.training
    backbone.model.eval()
    total, damaged, labels_lost = torch.zeros((), dtype=torch.float64), [], 0
    at_once = SCORED_AT_ONCE * processes.count
    for start in range(0, len(examples), at_once):
        some = examples[start : start + at_once]
        for fetched in loader.fetch(some, max_tokens):
            total += loss_sum(backbone, loader.place(fetched)).item()
            damaged += fetched.damaged
            labels_lost += fetched.labels_lost
        progress(start + len(some))
    backbone.model.train(training)
    (total,) = processes.add_up([total.to(backbone.device)])
    lost = loader.note_damaged(damaged, labels_lost) if loader.as_they_come else 0
    labels = count_labels(examples) - lost
    return math.nan if lost and not labels else total.item() / max(1, labels)


# ---- gradients ----------------------------------------------------------------------------------------------------


def accumulate_gradients(
    loader: Loader,
    examples: Sequence[Lesson],
    fetched: Sequence[Fetched] | None,
    seed: int,
    progress: Progress,
    warn: Callable[[str], None],
) -> torch.Tensor:
    """Leave the gradients of a step's loss (this process's share) in ``.grad``, times `Progress.loss_scale` where there
    is one, and return that loss.

    ``fetched`` is what `Loader.fetch` gives for the examples, where that has been done ahead.

    Labels of damaged images, which are found only now, are not among those that the loss is the mean of.

    Where memory runs out, in whichever process, all begin the same step again with micro-batches of half the size, and
    stay with them. The step's answers and what they weigh are as before.

    Raises:
        TrainingError: out of memory with micro-batches that cannot be made smaller.
    """
    processes, model = loader.processes, loader.backbone.model
    num_labels = count_labels(examples)  # of the whole step: every process sees the schedule
    while True:
        # Dropout: a function of the step, so resuming or trying again repeats it; processes draw apart.
        torch.manual_seed(seed + processes.index)
        if fetched is None:
            fetched = loader.fetch(examples, progress.micro_batch_tokens)
        loss = _backward(loader, fetched, num_labels, progress.loss_scale or 1.0)
        damaged = [row for each in fetched for row in each.damaged]
        happened = processes.highest(2 if loss is None else 1 if damaged else 0)
        if happened < 2:
            assert loss is not None
            if happened:
                lost = loader.note_damaged(damaged, sum(each.labels_lost for each in fetched))
                left = num_labels / (num_labels - lost) if lost < num_labels else 0.0
                for tensor in (loss, *(p.grad for p in model.parameters() if p.grad is not None)):
                    tensor *= left
            return loss
        loss = fetched = None
        _halve_micro_batches(examples, progress, processes)
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"Out of memory: from here on micro-batches are of {progress.micro_batch_tokens:,} tokens at most"
        warn(f"{text}; what a step learns from, and its learning rate, stay as they are.")


def _backward(loader: Loader, fetched: Sequence[Fetched], num_labels: int, scale: float) -> torch.Tensor | None:
    """The loss of these micro-batches, their gradients, times ``scale``, added up; None where memory ran out."""
    backbone, processes = loader.backbone, loader.processes
    loss = torch.zeros((), device=backbone.device)
    try:
        with processes.connected() if processes.sharded else nullcontext():
            for each in fetched:
                batch_loss = loss_sum(backbone, loader.place(each), loader.techniques.label_logits) / num_labels
                if batch_loss.requires_grad:  # not if only the projector is trained and no row has an image
                    (batch_loss * scale).backward()
                loss += batch_loss.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if processes.sharded:  # the others are in the middle of a pass that they cannot make without this one
            raise TrainingError(OUT_OF_MEMORY) from error
        return None  # dealt with by the caller: in here the error still holds the tensors of the failed pass
    return loss


def _halve_micro_batches(examples: Sequence[Lesson], progress: Progress, processes: Processes) -> None:
    largest = largest_micro_batch(examples, progress.micro_batch_tokens, processes.count)
    progress.micro_batch_tokens = min(progress.micro_batch_tokens, largest) // 2
    if largest_micro_batch(examples, progress.micro_batch_tokens, processes.count) == largest:
        raise TrainingError(OUT_OF_MEMORY)


# ---- update -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the steps, then a cosine to zero after the last."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, num_steps - rising)))


def peak_rate(config: TrainConfig, name: str) -> float:
    """The highest learning rate of the parameter of this name."""
    return config.projector_lr if config.projector_lr and part_of(name) == PARTS[1] else config.lr


def is_paged(config: TrainConfig, device: torch.device) -> bool:
    return config.method == "qlora" and device.type == "cuda"


def make_optimizer(config: TrainConfig, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW, a group for each peak learning rate; ``parameters`` come in the order of theirs.

    QLoRA's state is paged out to main memory where a GPU has no room for it, as the paper has it.
    """
    rates = itertools.groupby(parameters, key=lambda named: peak_rate(config, named[0]))
    groups = [{"params": [p for _, p in members], "peak": rate} for rate, members in rates]
    settings = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if is_paged(config, parameters[0][1].device):
        from bitsandbytes.optim.adamw import PagedAdamW

        return PagedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def add_up_and_clip(
    loss: torch.Tensor, tensors: Sequence[torch.Tensor], most: float, processes: Processes, scale: float = 1.0
) -> StepResult:
    """Give ``.grad`` the sum over all processes, divided by ``scale``, its norm at most ``most``."""
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]
    loss, *grads = processes.add_up([loss, *grads])
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = grad if scale == 1 else grad.div_(scale)  # a power of 2: nothing is rounded
    grad_norm = torch.nn.utils.clip_grad_norm_(tensors, most)
    return StepResult(*torch.stack([loss, grad_norm]).tolist())  # the one time that the CPU waits for the device


def apply_gradients(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """Move the adapter at ``rate``; each group at the same share of its own peak that ``rate`` is of ``peak``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"] / peak
    optimizer.step()
