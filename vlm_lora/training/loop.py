"""The step: what is learnt from, the loss, the update. Written to be read from top to bottom.

The loss of a step is the sum over its labelled tokens divided by their number over all micro-batches and processes,
so every answer's tokens weigh the same however the step is cut up.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example
from vlm_lora.errors import ModelError, Stopped, TrainingError
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, pack
from vlm_lora.training.batches import Plan, micro_batches, split_long
from vlm_lora.training.checkpoint import load_checkpoint, save_checkpoint

Report = Callable[..., None]
"""Called as ``report(kind, **values)`` with what a run has to tell; see `train` for the kinds."""

LOGITS_AT_ONCE = 1024
"""Labelled tokens whose logits are held at a time; more are computed in chunks and again in the backward pass."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example ready to learn from, and its tokens."""

    example: Example
    encoded: Encoded


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of tokens and, in the same order, the features of their images; ``num_labels`` tokens carry loss."""

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
    rows = [(lesson, part) for lesson in lessons for part in split_long(lesson.encoded, max_tokens)]
    batches = []
    for group in micro_batches([encoded for _, encoded in rows], max_tokens):
        packed = pack([[rows[i][1]] for i in group], backbone.pad_token_id)
        seen = [entry for i in group for entry in features.get(rows[i][0].example.images)]
        stacked = torch.cat([entry.features for entry in seen]) if seen else None
        placeholders = int((packed.input_ids == backbone.image_token_id).sum()) * backbone.merge_size**2
        if placeholders != (len(stacked) if seen else 0):
            raise ModelError(f"{placeholders} patches are expected by the tokens, {len(stacked)} were computed.")
        device = backbone.device
        batches.append(
            MicroBatch(
                packed.input_ids.to(device, non_blocking=True),
                packed.labels.to(device, non_blocking=True),
                packed.position_ids.to(device, non_blocking=True),
                packed.attention_mask.to(device, non_blocking=True),
                stacked.to(device, non_blocking=True) if seen else None,
                int((packed.labels[:, 1:] != IGNORE_INDEX).sum()),
            )
        )
    return batches


def loss_sum(backbone: Backbone, batch: MicroBatch) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens; logits are computed where there are labels, nowhere else."""
    hidden = backbone.forward(batch.input_ids, batch.attention_mask, batch.position_ids, batch.features)
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORE_INDEX
    hidden, targets = hidden[:, :-1][labelled], targets[labelled]
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


@torch.no_grad()
def mean_loss(backbone: Backbone, features: FeatureCache, lessons: Sequence[Lesson], max_tokens: int) -> float:
    """Loss per labelled token over all lessons; leaves weights and random state as they are."""
    training = backbone.model.training
    backbone.model.eval()
    total, count = 0.0, 0
    for start in range(0, len(lessons), 64):
        for batch in make_batches(backbone, features, lessons[start : start + 64], max_tokens):
            total += loss_sum(backbone, batch).item()
            count += batch.num_labels
    backbone.model.train(training)
    return total / max(1, count)


def run_steps(
    config: TrainConfig,
    adapter: Adapter,
    features: FeatureCache,
    lessons: Sequence[Lesson],
    held_out: Sequence[Lesson],
    folder: Path,
    identity: dict,
    accelerator: Accelerator,
    report: Report,
    stop: Callable[[], int | None],
) -> int:
    """Train to the end of the plan, from the newest checkpoint in ``folder`` if there is one; the number of steps.

    ``stop`` is asked behind each step; a signal's number has the run save and end with `Stopped`.
    """
    backbone = adapter.backbone
    parameters = adapter.named_parameters()
    tensors = [parameter for _, parameter in parameters]
    optimizer = torch.optim.AdamW(tensors, lr=0.0, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
    plan = Plan(
        [len(lesson.example.dialogues) for lesson in lessons],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )
    checkpoints = folder / "checkpoints"
    first = load_checkpoint(
        checkpoints, parameters, optimizer, identity, warn=lambda text: report("warning", text=text)
    )
    report("start", step=first, num_steps=plan.num_steps, answers=plan.answers_per_epoch, parameters=parameters)
    backbone.model.train()
    log = _open_log(folder / "metrics.jsonl", first) if accelerator.is_main_process else None
    started, answers_done = time.perf_counter(), 0

    for step in range(first, plan.num_steps + 1):
        # Behind every save_every steps and behind the last: held-out loss, checkpoint.
        if step == plan.num_steps or (step > first and step % config.save_every == 0):
            if held_out:
                held_out_loss = mean_loss(backbone, features, held_out, config.micro_batch_tokens)
                report("held_out", step=step, loss=held_out_loss)
                if log:
                    log.write(json.dumps({"step": step, "held_out_loss": held_out_loss}) + "\n")
            if accelerator.is_main_process:
                save_checkpoint(checkpoints, step, parameters, optimizer, identity, config.keep_checkpoints)
            accelerator.wait_for_everyone()
        if step == plan.num_steps:
            break

        # ---- the step --------------------------------------------------------------------------------------------
        torch.manual_seed(_step_seed(config.seed, step))  # dropout: a function of the step, so resuming repeats it
        chosen = [_choose(lessons[example], dialogues) for example, dialogues in plan.step(step)]
        batches = make_batches(backbone, features, chosen, config.micro_batch_tokens)
        num_labels = sum(batch.num_labels for batch in batches)  # of the whole step: every process sees the plan
        loss = torch.zeros((), device=backbone.device)
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            batch_loss = loss_sum(backbone, batch) / num_labels
            batch_loss.backward()
            loss += batch_loss.detach()
        if accelerator.num_processes > 1:
            _sum_gradients(tensors, accelerator)
            loss = accelerator.reduce(loss, "sum")
        grad_norm = torch.nn.utils.clip_grad_norm_(tensors, config.max_grad_norm)
        _require_finite(loss, grad_norm, step, chosen)
        if step < first + 2:
            _report_dead(parameters, step - first, report)
        rate = learning_rate(step, plan.num_steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------------------------------

        num_answers = sum(len(lesson.encoded.branches) for lesson in chosen)
        answers_done += num_answers
        seconds = time.perf_counter() - started
        line = {
            "step": step + 1,
            "loss": loss.item(),
            "lr": rate,
            "grad_norm": grad_norm.item(),
            "answers": num_answers,
            "tokens": sum(lesson.encoded.num_tokens for lesson in chosen),
            "answers_per_second": answers_done / seconds,
            "seconds": round(seconds, 3),
        }
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
        left = (plan.num_steps - step - 1) * seconds / (step + 1 - first)
        report("step", num_steps=plan.num_steps, seconds_left=left, **line)

        if signal_number := stop():
            if accelerator.is_main_process:
                save_checkpoint(checkpoints, step + 1, parameters, optimizer, identity, config.keep_checkpoints)
            raise Stopped(f"stopped behind step {step + 1:,} and saved; go on with --resume.", signal_number)

    if log:
        log.close()
    backbone.model.eval()
    return plan.num_steps


def _choose(lesson: Lesson, dialogues: tuple[int, ...]) -> Lesson:
    branches = tuple(lesson.encoded.branches[i] for i in dialogues)
    return replace(lesson, encoded=replace(lesson.encoded, branches=branches))


def _step_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "big") >> 1


def _sum_gradients(tensors: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Add up all processes' gradients. By hand and not by DDP: adapters are small, and no process can hang another
    by having no image, or no micro-batch at all, in this step."""
    flat = torch.cat([(t.grad if t.grad is not None else torch.zeros_like(t)).flatten() for t in tensors])
    flat = accelerator.reduce(flat, "sum")
    for tensor, grad in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.grad = grad.view_as(tensor).clone()


def _require_finite(loss: torch.Tensor, grad_norm: torch.Tensor, step: int, lessons: Sequence[Lesson]) -> None:
    if torch.isfinite(loss + grad_norm):
        return
    named = ", ".join(lesson.example.source for lesson in lessons[:8])
    raise TrainingError(
        f"Step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()}: not finite, and not applied. The "
        f"step's examples: {named}. Try a lower --lr, or --dtype float32; then go on from the last checkpoint with "
        "--resume."
    )


def _report_dead(parameters, nth_step: int, report: Report) -> None:
    """LoRA's B and a bottleneck's way up start at zero, so what stands before them has no gradient in the first step;
    behind the second every tensor must have one."""
    late = (".lora_A.", ".bottleneck.down.")
    watched = [(n, p) for n, p in parameters if nth_step > 0 or not any(part in n for part in late)]
    dead = [name for name, p in watched if p.grad is None or not p.grad.any()]
    if dead:
        report("warning", text=f"{len(dead)} of {len(watched)} adapter tensors get no gradient, first {dead[0]}.")


def _open_log(path: Path, first: int):
    """``metrics.jsonl`` open for writing behind step ``first``: lines of steps that are run again are dropped."""
    kept = []
    if first and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= first:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the last line of a killed run may be cut off
    log = path.open("w", encoding="utf-8")
    log.writelines(line + "\n" for line in kept)
    return log
