"""The step: what is learnt from, the loss, the update. Written to be read from top to bottom.

The loss of a step is the sum over its labelled tokens divided by their number over all micro-batches and processes,
so every answer's tokens weigh the same however the step is cut up.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from vlm_lora.config import TrainConfig, write_yaml
from vlm_lora.data.example import Example
from vlm_lora.errors import ModelError, Stopped, TrainingError
from vlm_lora.model.adapters.base import ADAPTED, PARTS, Adapter, part_of
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.device import is_out_of_memory
from vlm_lora.model.features import FeatureCache, ImageFeatures, Pixels
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, Packed, pack_apart, padded_tokens
from vlm_lora.training.batches import Plan, deal, micro_batches, split_long
from vlm_lora.training.checkpoint import (
    Progress,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
    writing,
)
from vlm_lora.training.processes import Processes

T = TypeVar("T")
Report = Callable[..., None]
"""Called as ``report(kind, **values)`` with what a run has to tell; see `train` for the kinds."""

LOGITS_AT_ONCE = 1024
"""Labelled tokens whose logits are held at a time; more are computed in chunks and again in the backward pass."""

SPIKE_WINDOW, SPIKE_LEAST = 50, 10
"""A loss more than twice the highest of the last 50 (once there are 10) is a spike."""

NEARLY = 1.1
"""A step whose largest micro-batch has so many times the tokens of another's may not fit where that did."""

OUT_OF_MEMORY = (
    "Out of memory, and there is nothing left to halve. Give a smaller --max-pixels (fewer tokens an image) or "
    "--micro-batch-tokens, --gradient-checkpointing, --dtype bfloat16, --method qlora, or a smaller base with --model."
)


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example ready to learn from, and its tokens."""

    example: Example
    encoded: Encoded


@dataclass(frozen=True, slots=True)
class Fetched:
    """A micro-batch before it is on the device, its images perhaps still pixels."""

    packed: Packed
    images: list[ImageFeatures | Pixels]

    @property
    def num_labels(self) -> int:
        return int((self.packed.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of tokens and, in the same order, the features of their images; ``num_labels`` tokens carry loss.

    All on the device but the tokens and labels, of which something is asked.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    features: torch.Tensor | None
    num_labels: int


def make_batches(
    backbone: Backbone, features: FeatureCache, lessons: Sequence[Lesson], max_tokens: int
) -> list[MicroBatch]:
    """A step's lessons as micro-batches of at most ``max_tokens`` tokens each, one image a row."""
    return [place(backbone, features, batch) for batch in fetch_batches(backbone, features, lessons, max_tokens)]


def fetch_batches(
    backbone: Backbone, features: FeatureCache, lessons: Sequence[Lesson], max_tokens: int
) -> list[Fetched]:
    """The part of `make_batches` that needs no model and can be done ahead, beside the step that computes."""
    rows = [(lesson, part) for lesson in lessons for part in split_long(lesson.encoded, max_tokens)]
    groups = micro_batches([encoded for _, encoded in rows], max_tokens)
    return [
        Fetched(
            _pinned(pack_apart([rows[i][1] for i in group], backbone.pad_token_id), backbone.device),
            [_pinned(entry, backbone.device) for i in group for entry in features.fetch(rows[i][0].example.images)],
        )
        for group in groups
    ]


def _pinned(tensors: T, device: torch.device) -> T:
    """The dataclass with its tensors where a GPU can fetch them from while it computes: copies from elsewhere wait."""
    if device.type != "cuda":
        return tensors
    members = ((each.name, getattr(tensors, each.name)) for each in fields(tensors))
    return replace(tensors, **{name: value.pin_memory() for name, value in members if torch.is_tensor(value)})


def place(backbone: Backbone, features: FeatureCache, fetched: Fetched) -> MicroBatch:
    """The micro-batch on the device; images that are still pixels go through the tower first."""
    packed, device = fetched.packed, backbone.device
    seen = [entry.features.to(device, non_blocking=True) for entry in features.compute(fetched.images)]
    placeholders = int((packed.input_ids == backbone.image_token_id).sum()) * backbone.merge_size**2
    if placeholders != sum(map(len, seen)):
        raise ModelError(f"{placeholders} patches are expected by the tokens, {sum(map(len, seen))} were computed.")
    return MicroBatch(
        packed.input_ids,
        packed.labels,
        packed.position_ids.to(device, non_blocking=True),
        packed.attention_mask.to(device, non_blocking=True),
        torch.cat(seen) if seen else None,
        fetched.num_labels,
    )


def share_out(lessons: Sequence[Lesson], max_tokens: int, num_processes: int) -> list[list[Lesson]]:
    """Each process's part of a step's lessons, in rows of at most ``max_tokens`` tokens."""
    rows = [replace(lesson, encoded=part) for lesson in lessons for part in split_long(lesson.encoded, max_tokens)]
    return [[rows[i] for i in sorted(dealt)] for dealt in deal([row.encoded for row in rows], num_processes)]


def fetch_own(
    backbone: Backbone, features: FeatureCache, lessons: Sequence[Lesson], max_tokens: int, processes: Processes
) -> list[Fetched]:
    """This process's share of the lessons. Where the base is sharded, all must make the same number of passes, as its
    pieces are put together in each: a process that has fewer repeats the shortest row, without a label."""
    shares = share_out(lessons, max_tokens, processes.count)
    fetched = fetch_batches(backbone, features, shares[processes.index], max_tokens)
    if processes.sharded:
        most = max(len(micro_batches([row.encoded for row in share], max_tokens)) for share in shares)
        shortest = min((row for share in shares for row in share), key=lambda row: row.encoded.num_tokens)
        for _ in range(most - len(fetched)):
            (filler,) = fetch_batches(backbone, features, [shortest], max_tokens)
            unlabelled = torch.full_like(filler.packed.labels, IGNORE_INDEX)
            fetched.append(replace(filler, packed=replace(filler.packed, labels=unlabelled)))
    return fetched


def imbalance(shares: Sequence[Sequence[Lesson]]) -> float:
    """Tokens of the busiest process over the mean of all: the others wait for it."""
    loads = [sum(row.encoded.num_tokens for row in share) for share in shares]
    return max(loads) * len(loads) / max(1, sum(loads))


def count_labels(lessons: Sequence[Lesson]) -> int:
    """Tokens that carry loss, whichever process has them."""
    return sum(int((b.labels != IGNORE_INDEX).sum()) for lesson in lessons for b in lesson.encoded.branches)


def loss_sum(backbone: Backbone, batch: MicroBatch) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens; logits are computed where there are labels, nowhere else."""
    hidden = backbone.forward(batch.input_ids, batch.attention_mask, batch.position_ids, batch.features)
    # Found on the CPU, where labels are kept: a GPU's answer to how many there are would have to be waited for.
    targets = batch.labels[:, 1:]
    places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    targets = targets[places].to(hidden.device, non_blocking=True)
    hidden = hidden[tuple(place.to(hidden.device, non_blocking=True) for place in places)]
    if len(targets) <= LOGITS_AT_ONCE:
        return _cross_entropy(backbone, hidden, targets)
    chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    return torch.stack([checkpoint(_cross_entropy, backbone, h, t, use_reentrant=False) for h, t in chunks]).sum()


def _cross_entropy(backbone: Backbone, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = backbone.logits(hidden)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), targets, reduction="sum")


def learning_rate(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the steps, then a cosine to zero behind the last."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, num_steps - rising)))


def peak_rate(config: TrainConfig, name: str) -> float:
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
        from bitsandbytes.optim import PagedAdamW

        return PagedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


@torch.no_grad()
def mean_loss(
    backbone: Backbone, features: FeatureCache, lessons: Sequence[Lesson], max_tokens: int, processes: Processes
) -> float:
    """Loss per labelled token over all lessons; leaves weights and random state as they are."""
    training = backbone.model.training
    backbone.model.eval()
    total = torch.zeros((), dtype=torch.float64)
    at_once = 64 * processes.count
    for start in range(0, len(lessons), at_once):
        for batch in fetch_own(backbone, features, lessons[start : start + at_once], max_tokens, processes):
            total += loss_sum(backbone, place(backbone, features, batch)).item()
    backbone.model.train(training)
    (total,) = processes.add_up([total.to(backbone.device)])
    return total.item() / max(1, count_labels(lessons))


def learn(
    backbone: Backbone,
    features: FeatureCache,
    lessons: Sequence[Lesson],
    fetched: Sequence[Fetched] | None,
    seed: int,
    progress: Progress,
    processes: Processes,
    report: Report,
) -> torch.Tensor:
    """Leave the gradients of a step's loss (this process's share) in ``.grad``, and return that loss.

    ``fetched`` is what `fetch_own` gives for the lessons, where that has been done ahead.

    Where memory runs out, in whichever process, all begin the same step again with micro-batches of half the size, and
    stay with them. The step's answers and what they weigh are as before.

    Raises:
        TrainingError: out of memory with micro-batches that cannot be made smaller.
    """
    num_labels = count_labels(lessons)  # of the whole step: every process sees the plan
    while True:
        # Dropout: a function of the step, so resuming or trying again repeats it; processes draw apart.
        torch.manual_seed(seed + processes.index)
        if fetched is None:
            fetched = fetch_own(backbone, features, lessons, progress.micro_batch_tokens, processes)
        loss = torch.zeros((), device=backbone.device)
        ran_out = False
        try:
            with processes.connected() if processes.sharded else nullcontext():
                for batch in fetched:
                    batch_loss = loss_sum(backbone, place(backbone, features, batch)) / num_labels
                    if batch_loss.requires_grad:  # not if only the projector is trained and no row has an image
                        batch_loss.backward()
                    loss += batch_loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if processes.sharded:  # the others are in the middle of a pass that they cannot make without this one
                raise TrainingError(OUT_OF_MEMORY) from error
            ran_out = True  # dealt with below: in here the error still holds the tensors of the failed pass
        if not processes.highest(ran_out):
            return loss
        largest = _largest(lessons, progress.micro_batch_tokens, processes)
        progress.micro_batch_tokens = min(progress.micro_batch_tokens, largest) // 2
        if _largest(lessons, progress.micro_batch_tokens, processes) == largest:
            raise TrainingError(OUT_OF_MEMORY)
        backbone.model.zero_grad(set_to_none=True)
        fetched = batch_loss = loss = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"Out of memory: from here on micro-batches are of {progress.micro_batch_tokens:,} tokens at most"
        report("warning", text=f"{text}; what a step learns from, and its learning rate, stay as they are.")


def run_steps(
    config: TrainConfig,
    adapter: Adapter,
    features: FeatureCache,
    lessons: Sequence[Lesson],
    held_out: Sequence[Lesson],
    folder: Path,
    identity: dict,
    processes: Processes,
    report: Report,
    stop: Callable[[], int | None],
    allow_change: Collection[str] = (),
) -> int:
    """Train to the end of the plan, from the newest checkpoint in ``folder`` if there is one; the number of steps.

    ``stop`` is asked behind each step; a signal's number has the run save and end with `Stopped`, unevaluated.
    """
    backbone = adapter.backbone
    parameters = sorted(adapter.named_parameters(), key=lambda named: peak_rate(config, named[0]))
    tensors = [parameter for _, parameter in parameters]
    optimizer = make_optimizer(config, parameters)
    plan = Plan(
        [len(lesson.example.dialogues) for lesson in lessons],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )

    def warn(text: str) -> None:
        report("warning", text=text)

    def lessons_of(step: int) -> list[Lesson]:
        return [_choose(lessons[example], dialogues) for example, dialogues in plan.step(step)]

    checkpoints = folder / "checkpoints"
    progress = Progress(micro_batch_tokens=config.micro_batch_tokens)
    progress = processes.on_main(
        lambda: load_checkpoint(checkpoints, progress, parameters, optimizer, identity, warn, allow_change)
    )
    first = progress.step
    _start_alike(tensors, optimizer, first, processes)

    def imbalance_of(chosen: Sequence[Lesson]) -> float:
        return imbalance(share_out(chosen, progress.micro_batch_tokens, processes.count))

    soon = range(first, min(first + 100, plan.num_steps)) if processes.count > 1 else ()
    report(
        "start",
        step=first,
        num_steps=plan.num_steps,
        answers=plan.answers_per_epoch,
        parameters=parameters,
        processes=processes.count,
        sharded=processes.sharded,
        imbalance=sum(imbalance_of(lessons_of(step)) for step in soon) / max(1, len(soon)),
    )
    processes.begin_steps()
    backbone.model.train()
    _report_frozen(backbone, warn)
    log = None
    if processes.is_main:
        with writing(folder):  # only now: if the checkpoint is of other settings, config.yaml stays its own
            write_yaml(config.replace(output=str(folder)), folder / "config.yaml")
            log = _open_log(folder / "metrics.jsonl", first)

    def write(line: dict) -> None:
        if log:
            with writing(folder / "metrics.jsonl"):
                log.write(json.dumps(line) + "\n")
                log.flush()
        if config.report_to:
            numbers = {name: value for name, value in line.items() if name not in ("step", "examples")}
            with writing(folder / config.report_to):
                processes.accelerator.log(numbers, step=line["step"])

    def save() -> None:
        save_checkpoint(checkpoints, progress, parameters, optimizer, identity, config.keep_checkpoints)

    def due() -> bool:
        """Whether the steps done end in a checkpoint and a held-out loss."""
        return progress.step > 0 and (progress.step % config.save_every == 0 or progress.step == plan.num_steps)

    def hold_out() -> None:
        if not held_out:
            return
        held_out_loss = mean_loss(backbone, features, held_out, progress.micro_batch_tokens, processes)
        report("held_out", step=progress.step, loss=held_out_loss)
        _note_best(progress, held_out_loss)
        if math.isfinite(held_out_loss):
            write({"step": progress.step, "held_out_loss": held_out_loss})

    if due():  # a checkpoint is written before its held-out loss is known, so that a kill in between loses nothing
        hold_out()

    # Out of memory is found out here and not hours later: the step with the largest micro-batch goes first, and is
    # forgotten again.
    largest = _largest_step(plan, lessons_of, first, progress.micro_batch_tokens, processes)
    if largest != first:
        learn(backbone, features, lessons_of(largest), None, 0, progress, processes, report)
        optimizer.zero_grad(set_to_none=True)

    def fetch(step: int) -> tuple[list[Lesson], int, list[Fetched]]:
        chosen, size = lessons_of(step), progress.micro_batch_tokens
        return chosen, size, fetch_own(backbone, features, chosen, size, processes)

    ahead = _ahead(fetch, range(first, plan.num_steps))
    started, answers_done, losses = time.perf_counter(), 0, deque(maxlen=SPIKE_WINDOW)

    for step in range(first, plan.num_steps):
        if config.patience and progress.since_best >= config.patience:
            break

        # ---- the step --------------------------------------------------------------------------------------------
        chosen, size, fetched = next(ahead)
        if size != progress.micro_batch_tokens:  # memory has run out since it was fetched
            fetched = None
        loss = learn(backbone, features, chosen, fetched, _step_seed(config.seed, step), progress, processes, report)
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]
        loss, *grads = processes.add_up([loss, *grads])
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        grad_norm = torch.nn.utils.clip_grad_norm_(tensors, config.max_grad_norm)
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the one time that the CPU waits for the device
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        rate = learning_rate(step, plan.num_steps, config.lr, config.warmup)
        if finite:
            if step < first + 2:
                _report_dead(parameters, step - first, warn)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"] / config.lr
            optimizer.step()
        else:
            write({"step": step + 1, "examples": _sources(chosen)})
            _skip_or_stop(config, progress, f"loss {loss}, gradient norm {grad_norm}", chosen, warn)
        optimizer.zero_grad(set_to_none=True)
        progress.step = step + 1
        # ----------------------------------------------------------------------------------------------------------

        num_answers = sum(len(lesson.encoded.branches) for lesson in chosen)
        answers_done += num_answers
        seconds = time.perf_counter() - started
        numbers = {"loss": loss, "lr": rate, "grad_norm": grad_norm}
        rest = {
            "answers": num_answers,
            "tokens": sum(lesson.encoded.num_tokens for lesson in chosen),
            "answers_per_second": answers_done / seconds,
            "seconds": round(seconds, 3),
        }
        if processes.count > 1:
            rest["imbalance"] = round(imbalance_of(chosen), 4)
        write({"step": step + 1} | (numbers if finite else {"skipped": True}) | rest)
        left = (plan.num_steps - step - 1) * seconds / (step + 1 - first)
        report("step", step=step + 1, num_steps=plan.num_steps, seconds_left=left, **numbers, **rest)
        if finite and len(losses) >= SPIKE_LEAST and numbers["loss"] > 2 * max(losses):
            text = f"loss {numbers['loss']:.4g} is more than twice the highest of the last {len(losses)} steps"
            write({"step": step + 1, "examples": _sources(chosen)})
            warn(f"Step {step + 1:,}: {text}. The step's examples: {_named(chosen)}.")
        losses.extend([numbers["loss"]] if finite else [])

        # Behind every save_every steps, and behind the last: checkpoint, held-out loss. On a signal: checkpoint.
        signal_number = processes.highest(stop() or 0)  # all stop behind the same step
        if due() or signal_number:
            processes.on_main(save)
        if due() and not signal_number:
            hold_out()
            signal_number = processes.highest(stop() or 0)  # it may have come meanwhile
        if signal_number:
            raise Stopped(f"stopped behind step {step + 1:,} and saved; go on with --resume.", signal_number)

    if log:
        log.close()
    if (config.patience or config.load_best_at_end) and progress.best_step is not None:
        processes.on_main(lambda: load_weights(checkpoints, progress.best_step, parameters))
        processes.copy_from_main(tensors)
        report("best", step=progress.best_step, loss=progress.best_loss, last=progress.step, num_steps=plan.num_steps)
    backbone.model.eval()
    return progress.step


def _ahead(fetch: Callable[[int], Any], steps: range) -> Iterator[Any]:
    """``fetch(step)`` for each step; the next one's runs in a thread while the caller works on this one's."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in steps:
            fetched = coming.result() if coming else fetch(step)
            coming = thread.submit(fetch, step + 1) if step + 1 in steps else None
            yield fetched


def _choose(lesson: Lesson, dialogues: tuple[int, ...]) -> Lesson:
    branches = tuple(lesson.encoded.branches[i] for i in dialogues)
    return replace(lesson, encoded=replace(lesson.encoded, branches=branches))


def _step_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "big") >> 1


def _start_alike(
    tensors: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int, processes: Processes
) -> None:
    """Every process starts from what the main one made or read; the others need not see the run folder."""
    processes.copy_from_main(tensors)
    if first and processes.count > 1:

        def state() -> dict:
            return tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, optimizer.state_dict())

        load_optimizer(optimizer, processes.on_main(state))


def _largest(lessons: Sequence[Lesson], max_tokens: int, processes: Processes) -> int:
    """Tokens, padding included, of the largest micro-batch in any process."""
    shares = [[row.encoded for row in share] for share in share_out(lessons, max_tokens, processes.count)]
    return max(padded_tokens([rows[i] for i in group]) for rows in shares for group in micro_batches(rows, max_tokens))


def _largest_step(
    plan: Plan, lessons_of: Callable[[int], list[Lesson]], first: int, max_tokens: int, processes: Processes
) -> int:
    """Of the steps from ``first`` on, the one with the largest micro-batch, or ``first`` where that is nearly as large;
    of a long plan 2,000 are looked at."""

    def size(step: int) -> int:
        return _largest(lessons_of(step), max_tokens, processes)

    steps = range(first, plan.num_steps, max(1, (plan.num_steps - first) // 2000))
    largest = max(steps, key=size, default=first)
    return largest if steps and size(largest) > NEARLY * size(first) else first


def _skip_or_stop(config: TrainConfig, progress: Progress, numbers: str, lessons: Sequence[Lesson], warn) -> None:
    progress.skipped += 1
    text = (
        f"Step {progress.step + 1:,}: {numbers}: not finite, and not applied. The step's examples: {_named(lessons)}."
    )
    if config.on_nonfinite == "skip" and progress.skipped <= config.max_skipped:
        warn(f"{text} Left out, the {progress.skipped}. of at most {config.max_skipped}.")
        return
    advice = "Try a lower --lr, or --dtype float32. From the last checkpoint, --resume goes on"
    if config.on_nonfinite == "skip":
        raise TrainingError(f"{text} More than --max-skipped {config.max_skipped} steps. {advice}.")
    raise TrainingError(f"{text} {advice}, with --on-nonfinite skip leaving such steps out.")


def _sources(lessons: Sequence[Lesson]) -> list[str]:
    return [lesson.example.source for lesson in lessons]


def _named(lessons: Sequence[Lesson]) -> str:
    more = f" and {len(lessons) - 8} more, all named in metrics.jsonl" if len(lessons) > 8 else ""
    return ", ".join(_sources(lessons[:8])) + more


def _note_best(progress: Progress, held_out_loss: float) -> None:
    if math.isfinite(held_out_loss) and (progress.best_loss is None or held_out_loss < progress.best_loss):
        progress.best_step, progress.best_loss, progress.since_best = progress.step, held_out_loss, 0
    else:
        progress.since_best += 1


def _report_frozen(backbone: Backbone, warn: Callable[[str], None]) -> None:
    adapted = [(n, p) for n, p in backbone.model.named_parameters() if ADAPTED.search(n)]
    frozen = [name for name, p in adapted if not p.requires_grad]
    if frozen:
        warn(f"{len(frozen)} of {len(adapted)} adapter tensors are frozen and will learn nothing, first {frozen[0]}.")


def _report_dead(parameters, nth_step: int, warn: Callable[[str], None]) -> None:
    """LoRA's B and a bottleneck's way up start at zero, so what stands before them has no gradient in the first step;
    behind the second every tensor must have one."""
    late = (".lora_A.", ".bottleneck.down.")
    watched = [(n, p) for n, p in parameters if nth_step > 0 or not any(part in n for part in late)]
    dead = [name for name, p in watched if p.grad is None or not p.grad.any()]
    if dead:
        warn(f"{len(dead)} of {len(watched)} adapter tensors get no gradient, first {dead[0]}.")


def _open_log(path: Path, first: int):
    """``metrics.jsonl`` open for writing behind step ``first``: lines of what is done again are dropped, of later steps
    and of the held-out loss behind this one."""
    kept = []
    if first and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                read = json.loads(line)
                if read["step"] < first or (read["step"] == first and "held_out_loss" not in read):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)  # at once: a kill in between leaves the old lines
    return path.open("a", encoding="utf-8")
