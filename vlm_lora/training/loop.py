"""The training loop: resume, step after step, and what happens now and then. `TrainingLoop.run` reads top to bottom."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_map

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import DataError, Stopped, TrainingError
from vlm_lora.model.adapters.base import ADAPTED, Adapter
from vlm_lora.model.device import is_out_of_memory, peak_memory
from vlm_lora.training.batches import Fetched, Loader, imbalance, largest_micro_batch
from vlm_lora.training.checkpoint import (
    FIRST_SCALE,
    Progress,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from vlm_lora.training.compiled import COMPILER_ERRORS, difference, in_short, shaken
from vlm_lora.training.cost import cost_model
from vlm_lora.training.events import Events
from vlm_lora.training.fitting import device_here, fitting_tokens
from vlm_lora.training.folder import RunFolder
from vlm_lora.training.held_out import HeldOut
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.prepare import Prepared
from vlm_lora.training.processes import Processes
from vlm_lora.training.step import (
    StepResult,
    accumulate_gradients,
    add_up_and_clip,
    apply_gradients,
    learning_rate,
    make_optimizer,
    mean_loss,
    peak_rate,
)

SPIKE_WINDOW, SPIKE_LEAST = 50, 10
"""A loss more than twice the highest of the last 50 (once there are 10) is a spike."""

NEARLY = 1.1
"""A step whose largest micro-batch has this many times the tokens of another's may not fit where that did."""

Captions = Callable[[Sequence[Example]], list[Mapping[str, str]]]
"""What the model says of each example's images as it is now, with what metrics.jsonl is to say of it."""

STEPS_SEARCHED = 2000
"""Of a long run, the steps among which the one with the largest micro-batch is looked for."""


class TrainingLoop:
    """Trains an adapter to the end of its schedule.

    Args:
        folder: the run's, with its checkpoints and metrics.
        stop: asked after each step; a signal's number has the run save and end with `Stopped`, unevaluated.

    Attributes:
        progress: what the run has come to.
        held_out: the held-out examples, and how samples of them are taken.
        first: how many steps were done before, in the run that is resumed.
        step_ends: `time.perf_counter` at the end of each of the first three steps of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        adapter: Adapter,
        loader: Loader,
        data: Prepared,
        folder: RunFolder,
        events: Events,
        stop: Callable[[], int | None],
    ):
        self.config, self.loader, self.data, self.folder, self.events, self.stop = (
            config, loader, data, folder, events, stop,
        )  # fmt: skip
        self.backbone, self.processes = loader.backbone, loader.processes
        self.parameters = sorted(adapter.named_parameters(), key=lambda named: peak_rate(config, named[0]))
        self.tensors = [parameter for _, parameter in self.parameters]
        self.optimizer = make_optimizer(config, self.parameters)
        self.examples = data.weighted
        self.schedule = loader.techniques.schedule(config, self.examples.num_branches)
        self.held_out = HeldOut.of(
            config, self.examples, data.held_out, self.schedule.num_steps, loader.features.content_hash
        )
        self.progress = Progress(config.micro_batch_tokens or self._fitting_tokens(), val_images=self.held_out.size)
        self.sample = data.held_out
        self.watched: list[Example] = []
        self.captions: Captions = lambda examples: []
        self.first = 0
        self.step_ends: list[float] = []
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.peak: tuple[int, int] | None = None

    def run(self, allow_change: Collection[str] = (), captions: Captions | None = None) -> int:
        """Train from the newest checkpoint, if there is one, to the end; the number of steps.

        Args:
            captions: by which some held-out images are captioned at the start and at each checkpoint, by the model in
                eval mode; it leaves weights and random state as they are.

        Raises:
            Stopped: a signal came, and the run is saved.
            TrainingError: numbers are not finite, or memory is not enough.
        """
        first = self.first = self._resume(allow_change)
        last = self.schedule.num_steps
        self._take_sample()
        if captions:
            self._choose_watched(captions)
        self._start(first)
        if self._is_due():  # a checkpoint is written before its held-out loss is known: a kill in between lost nothing
            self._evaluate()
        if self._is_due() or not first:
            self._watch()
        if self.backbone.compiled and first < last:
            self._check_compiled(first)
        self._try_largest_step(first)
        batches = _ahead(self._fetch, range(first, last))
        started, answers_done = time.perf_counter(), 0

        for step in range(first, last):
            if self.config.patience and self.progress.since_best >= self.config.patience:
                break
            examples, max_tokens, fetched = next(batches)
            if max_tokens != self.progress.micro_batch_tokens:  # memory has run out since it was fetched
                fetched = None
            result = self._compute(step, examples, fetched)
            rate = learning_rate(step, last, self.config.lr, self.config.warmup)
            if result.finite:
                if step < first + 2:
                    self._warn_of_dead_tensors(step - first)
                apply_gradients(self.optimizer, rate, self.config.lr)
                self.progress.note_scaled_step()
            else:
                self.folder.log({"step": step + 1, "examples": _sources(examples)})
                self._skip_or_stop(result, examples)
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.step = step + 1

            answers_done += sum(len(each.branches) for each in examples)
            self._report(first, examples, result, rate, started, answers_done)
            self._warn_of_spike(result, examples)
            self._save_and_evaluate_now_and_then()

        self._take_best()
        self._score_all_held_out()
        self.folder.close_log()
        self.backbone.model.eval()
        return self.progress.step

    # -- before the first step -------------------------------------------------------------------------------------

    def _fitting_tokens(self) -> int:
        """Of a micro-batch on this GPU, as the main process decides it for all."""

        def decide() -> int:
            cost = cost_model(self.config, self.backbone.dtype, self.backbone.device.type)
            patches = self.loader.features.patches
            here, together = device_here(self.backbone.device), (self.processes.count, self.processes.sharded)
            return fitting_tokens(cost, self.schedule, self.examples, patches, here, *together)

        return self.processes.on_main(decide)

    def _resume(self, allow_change: Collection[str]) -> int:
        """Restore the newest checkpoint in every process; the step to go on from."""
        self.progress = self.processes.on_main(
            lambda: load_checkpoint(
                self.folder.checkpoints, self.progress, self.parameters, self.optimizer, self.folder.identity,
                self.events.warning, allow_change,
            )
        )  # fmt: skip
        if self.backbone.dtype != torch.float16:
            self.progress.loss_scale = None
        elif self.progress.loss_scale is None:
            self.progress.loss_scale = FIRST_SCALE
        _start_alike(self.tensors, self.optimizer, self.progress.step, self.processes)
        return self.progress.step

    def _take_sample(self) -> None:
        """The held-out examples that are scored at each checkpoint: those of before, for what was the best so far was
        so on them, unless --val-images says other ones."""
        held_out, progress, wanted = self.held_out, self.progress, self.config.val_images
        everything = len(held_out.examples)
        before = everything if progress.val_images is None else min(progress.val_images, everything)
        if wanted is not None and min(wanted, everything) != before:
            self.events.warning(
                f"--val-images {wanted}: earlier held-out losses are of {before:,} images, and cannot be compared "
                "with those from here on. The search for the best checkpoint starts again."
            )
            progress.best_step, progress.best_loss, progress.since_best = None, None, 0
            before = min(wanted, everything)
        elif progress.val_images is None and held_out.size < everything:
            self.events.warning(
                f"The held-out losses of this run, which an earlier release began, are of all {everything:,} images at "
                f"each checkpoint, and stay so. --val-images {held_out.size} takes a sample, as a new run does."
            )
        progress.val_images, self.sample = before, held_out.sample(before)
        if before < everything:
            steps = held_out.share(everything) * min(self.config.save_every, self.schedule.num_steps)
            self.events.sample(images=before, of=everything, share=held_out.share(before), steps=steps)

    def _start(self, first: int) -> None:
        soon = range(first, min(first + 100, self.schedule.num_steps)) if self.processes.count > 1 else ()
        self.events.start(
            step=first,
            num_steps=self.schedule.num_steps,
            answers=self.schedule.answers_per_epoch,
            parameters=self.parameters,
            processes=self.processes.count,
            sharded=self.processes.sharded,
            imbalance=sum(self._imbalance(self._examples(step)) for step in soon) / max(1, len(soon)),
        )
        self.processes.begin_steps()
        self.backbone.model.train()
        self._warn_of_frozen_tensors()
        # Only now: if the checkpoint is of other settings, its files stay
        damaged = [BadRow(*row) for row in self.progress.damaged]
        self.folder.begin(self.config, first, (*self.data.bad_rows, *damaged))

    def _check_compiled(self, first: int) -> None:
        """Compute a step with compiled layers and without, from an adapter that is zero nowhere: where the gradients
        are not the same, or nothing can be compiled here, the run goes on without."""
        self.events.compiling()
        examples, wrong = self._examples(first), None
        with shaken(self.tensors):
            self.backbone.use_compiled(False)
            accumulate_gradients(self.loader, examples, None, 0, self.progress, self.events.warning)
            expected = [tensor.grad for tensor in self.tensors]
            self.optimizer.zero_grad(set_to_none=True)
            self.backbone.use_compiled(True)
            try:
                accumulate_gradients(self.loader, examples, None, 0, self.progress, self.events.warning)
                wrong = difference([tensor.grad for tensor in self.tensors], expected, self.backbone.dtype)
            except COMPILER_ERRORS as error:
                wrong = f"{in_short(error)}. It needs a C compiler and Python's headers"
            self.optimizer.zero_grad(set_to_none=True)
        if self.processes.highest(wrong is not None):
            self._do_without_compiled(wrong or "another process says so")

    def _do_without_compiled(self, why: str) -> None:
        self.backbone.use_compiled(False)
        self.events.warning(f"torch.compile cannot be used here: {why}. Training continues without it, and is slower.")

    def _try_largest_step(self, first: int) -> None:
        """Out of memory is found out here and not hours later: the step with the largest micro-batch is computed first,
        and its gradients are dropped."""
        largest = self._largest_step(first)
        if largest != first:
            accumulate_gradients(self.loader, self._examples(largest), None, 0, self.progress, self.events.warning)
            self._leave_out_damaged()
            self.optimizer.zero_grad(set_to_none=True)

    def _largest_step(self, first: int) -> int:
        """The step with the largest micro-batch, or ``first`` where that is nearly as large."""

        def size(step: int) -> int:
            return largest_micro_batch(self._examples(step), self.progress.micro_batch_tokens, self.processes.count)

        num_steps = self.schedule.num_steps
        steps = range(first, num_steps, max(1, (num_steps - first) // STEPS_SEARCHED))
        largest = max(steps, key=size, default=first)
        return largest if steps and size(largest) > NEARLY * size(first) else first

    # -- a step ----------------------------------------------------------------------------------------------------

    def _examples(self, step: int) -> list[Lesson]:
        chosen = [self.examples[i].with_branches(dialogues) for i, dialogues in self.schedule.step(step)]
        return self.loader.rows(chosen)

    def _fetch(self, step: int) -> tuple[list[Lesson], int, list[Fetched]]:
        """A step's examples, and its micro-batches of at most so many tokens."""
        examples, max_tokens = self._examples(step), self.progress.micro_batch_tokens
        return examples, max_tokens, self.loader.fetch(examples, max_tokens)

    def _compute(self, step: int, examples: Sequence[Lesson], fetched: Sequence[Fetched] | None) -> StepResult:
        """Leave the step's gradients in ``.grad``. Where they are too large for float16, the step is computed again
        with half the loss scale: it is not left out."""
        while True:
            loss, scale = self._gradients(step, examples, fetched), self.progress.loss_scale or 1.0
            self._leave_out_damaged()
            result = add_up_and_clip(loss, self.tensors, self.config.max_grad_norm, self.processes, scale)
            if scale <= 1 or not result.overflowed:
                return result
            self.progress.halve_scale()
            self.optimizer.zero_grad(set_to_none=True)
            fetched = None

    def _gradients(self, step: int, examples: Sequence[Lesson], fetched) -> torch.Tensor:
        seed = _step_seed(self.config.seed, step)
        if self.backbone.compiled and self.processes.count == 1:
            try:
                return accumulate_gradients(self.loader, examples, fetched, seed, self.progress, self.events.warning)
            except COMPILER_ERRORS as error:  # one that is not the compiler's comes again below
                self._do_without_compiled(in_short(error))
            self.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(self.loader, examples, fetched, seed, self.progress, self.events.warning)

    def _skip_or_stop(self, result: StepResult, examples: Sequence[Lesson]) -> None:
        config, progress = self.config, self.progress
        progress.skipped += 1
        text = (
            f"Step {progress.step + 1:,}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, and not "
            f"applied. The step's examples: {_named(examples)}."
        )
        if config.on_nonfinite == "skip" and progress.skipped <= config.max_skipped:
            self.events.warning(f"{text} Left out, the {progress.skipped}. of at most {config.max_skipped}.")
            return
        advice = "Try a lower --lr, or --dtype float32. --resume continues from the last checkpoint"
        if config.on_nonfinite == "skip":
            raise TrainingError(f"{text} More than --max-skipped {config.max_skipped} steps. {advice}.")
        raise TrainingError(f"{text} {advice}, with --on-nonfinite skip leaving such steps out.")

    def _leave_out_damaged(self) -> None:
        """List the rows whose images were found to be damaged, once each; or save and end the run for them."""
        found = list(dict.fromkeys(self.loader.damaged))
        self.loader.damaged.clear()
        known = {(source, line) for source, line, _ in self.progress.damaged} if found else ()
        new = [row for row in found if (row.source, row.line) not in known]
        if not new:
            return
        rows = f"{new[0].place}: {new[0].reason}" + (f" (and {len(new) - 1} more rows)" if len(new) > 1 else "")
        if self.config.on_bad_row == "stop":
            if self.progress.step > self.first and not self._is_due():  # else it is saved
                self.processes.on_main(self._save)
            done = self.progress.step
            when = f"It was found after {done:,} steps, which are saved." if done else "No step is done yet."
            raise DataError(
                f"{rows}. {when} Mend it and start again, or continue without such rows: "
                "--resume --on-bad-row quarantine --allow-change on_bad_row. With --validate-first yes, all are found "
                "before the first step."
            )
        self.progress.damaged += [(row.source, row.line, row.reason) for row in new]
        self.folder.quarantine(new)
        self.events.warning(f"{rows}. Left out: {len(self.progress.damaged):,} rows so far, see quarantined.jsonl.")

    # -- after a step ----------------------------------------------------------------------------------------------

    def _report(
        self,
        first: int,
        examples: Sequence[Lesson],
        result: StepResult,
        rate: float,
        started: float,
        answers_done: int,
    ) -> None:
        """Into metrics.jsonl, and to whoever listens."""
        step, num_steps = self.progress.step, self.schedule.num_steps
        seconds = time.perf_counter() - started
        if len(self.step_ends) < 3:
            self.step_ends.append(time.perf_counter())
        numbers = {"loss": result.loss, "lr": rate, "grad_norm": result.grad_norm}
        work = {
            "answers": sum(len(each.branches) for each in examples),
            "tokens": sum(each.num_tokens for each in examples),
            "answers_per_second": answers_done / seconds,
            "seconds": round(seconds, 3),
        }
        shares = {"imbalance": round(self._imbalance(examples), 4)} if self.processes.count > 1 else {}
        peak = peak_memory(self.backbone.device)
        if peak and peak != self.peak:
            self.peak, (used, reserved) = peak, peak
            shares |= {"memory_used": used, "memory_reserved": reserved}
        if self.progress.loss_scale:
            shares |= {"loss_scale": self.progress.loss_scale, "overflows": self.progress.overflows}
        self.folder.log({"step": step} | (numbers if result.finite else {"skipped": True}) | work | shares)
        left = (num_steps - step) * seconds / (step - first)
        self.events.step(step=step, num_steps=num_steps, seconds_left=left, **numbers, **work)

    def _warn_of_spike(self, result: StepResult, examples: Sequence[Lesson]) -> None:
        if not result.finite:
            return
        if len(self.losses) >= SPIKE_LEAST and result.loss > 2 * max(self.losses):
            step = self.progress.step
            text = f"loss {result.loss:.4g} is more than twice the highest of the last {len(self.losses)} steps"
            self.folder.log({"step": step, "examples": _sources(examples)})
            self.events.warning(f"Step {step:,}: {text}. The step's examples: {_named(examples)}.")
        self.losses.append(result.loss)

    def _save_and_evaluate_now_and_then(self) -> None:
        """After every ``save_every`` steps and after the last: checkpoint, held-out loss, captions. On a signal:
        checkpoint."""
        signal_number = self.processes.highest(self.stop() or 0)  # all stop after the same step
        if self._is_due() or signal_number:
            self.processes.on_main(self._save)
        if self._is_due() and not signal_number:
            self._evaluate()
            self._watch()
            if self.loader.as_they_come:  # once all have been seen, the tower's memory is the training's
                self.loader.features.park_tower(self.data.images)
            signal_number = self.processes.highest(self.stop() or 0)  # it may have come meanwhile
        self._end_on(signal_number)

    def _end_on(self, signal_number: int) -> None:
        if signal_number:
            raise Stopped(
                f"stopped after step {self.progress.step:,} and saved; resume it with --resume.", signal_number
            )

    def _is_due(self) -> bool:
        """Whether the steps done end in a checkpoint and a held-out loss."""
        step = self.progress.step
        return step > 0 and (step % self.config.save_every == 0 or step == self.schedule.num_steps)

    def _save(self) -> None:
        save_checkpoint(
            self.folder.checkpoints, self.progress, self.parameters, self.optimizer, self.folder.identity,
            self.config.keep_checkpoints,
        )  # fmt: skip

    def _evaluate(self) -> None:
        """The loss of the held-out sample, and whether it is the best so far."""
        if not self.data.held_out:
            return
        progress = self.progress
        loss = mean_loss(self.loader, self.sample, progress.micro_batch_tokens)
        self._leave_out_damaged()
        self._report_held_out("held_out_loss", loss, len(self.sample))
        progress.note_held_out_loss(loss)

    def _choose_watched(self, captions: Captions) -> None:
        held_out, wanted = self.held_out, self.config.watch
        one = held_out.watched(1, self.loader.is_usable)
        if wanted == 0 or not one:
            return
        self.captions, watched = captions, held_out.watched(wanted, self.loader.is_usable)
        self.watched = [each.example for each in watched]
        self.events.watching(images=len(watched), share=held_out.share_of_watching(watched or one))

    def _watch(self) -> None:
        """Caption the images that are watched. The main process does, or where the base is in pieces, all together."""
        if not self.watched:
            return
        model = self.backbone.model
        training = model.training
        model.eval()
        said = self._say() if self.processes.sharded else self.processes.on_main(self._say)
        model.train(training)
        if said is None:
            self.watched = []
            self.events.warning("There is not enough memory to caption held-out images: no more are captioned.")
            return
        self.folder.log({"step": self.progress.step, "watched": said})
        self.events.watched(step=self.progress.step, captions=said)

    def _say(self) -> list[Mapping[str, str]] | None:
        """None where memory is not enough, which ends no run. Where the base is in pieces it does: the others wait."""
        try:
            return self.captions(self.watched)
        except (RuntimeError, MemoryError) as error:
            if self.processes.sharded or not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return None

    def _score_all_held_out(self) -> None:
        """The loss of all held-out examples by the adapter that the run ends with, where the checkpoints' losses were
        of a sample."""
        everything = len(self.data.held_out)
        if len(self.sample) == everything:
            return

        def progress(done: int) -> None:  # this takes a while, and a signal does not wait for it
            self.events.scoring(done, everything)
            self._end_on(self.processes.highest(self.stop() or 0))

        loss = mean_loss(self.loader, self.data.held_out, self.progress.micro_batch_tokens, progress)
        self._leave_out_damaged()
        self._report_held_out("held_out_loss_of_all", loss, everything)

    def _report_held_out(self, name: str, loss: float, images: int) -> None:
        step, everything = self.progress.step, len(self.data.held_out)
        self.events.held_out(step=step, loss=loss, images=images, of=everything)
        if math.isfinite(loss):
            self.folder.log({"step": step, name: loss, "held_out_images": images, "held_out_of": everything})

    def _take_best(self) -> None:
        """End with the adapter of the lowest held-out loss, where that is asked for."""
        progress = self.progress
        if not (self.config.patience or self.config.load_best_at_end):
            return
        if progress.best_step is None or progress.best_loss is None:
            return
        best, loss = progress.best_step, progress.best_loss
        self.processes.on_main(lambda: load_weights(self.folder.checkpoints, best, self.parameters))
        self.processes.copy_from_main(self.tensors)
        sizes = {"images": len(self.sample), "of": len(self.data.held_out)}
        self.events.best(step=best, loss=loss, **sizes, last=progress.step, num_steps=self.schedule.num_steps)

    def _imbalance(self, examples: Sequence[Lesson]) -> float:
        return imbalance(examples, self.progress.micro_batch_tokens, self.processes.count)

    # -- no adapter silently dead ----------------------------------------------------------------------------------

    def _warn_of_frozen_tensors(self) -> None:
        adapted = [(n, p) for n, p in self.backbone.model.named_parameters() if ADAPTED.search(n)]
        frozen = [name for name, p in adapted if not p.requires_grad]
        if frozen:
            self.events.warning(
                f"{len(frozen)} of {len(adapted)} adapter tensors are frozen and will learn nothing, first {frozen[0]}."
            )

    def _warn_of_dead_tensors(self, nth_step: int) -> None:
        """LoRA's B and a bottleneck's way up start at zero, so what stands before them has no gradient in the first
        step; after the second every tensor must have one."""
        late = (".lora_A.", ".bottleneck.down.")
        watched = [(n, p) for n, p in self.parameters if nth_step > 0 or not any(part in n for part in late)]
        dead = [name for name, p in watched if p.grad is None or not p.grad.any()]
        if dead:
            self.events.warning(f"{len(dead)} of {len(watched)} adapter tensors get no gradient, first {dead[0]}.")


def _ahead(fetch: Callable[[int], Any], steps: range) -> Iterator[Any]:
    """``fetch(step)`` for each step; the next one's runs in a thread while the caller works on this one's."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in steps:
            fetched = coming.result() if coming else fetch(step)
            coming = thread.submit(fetch, step + 1) if step + 1 in steps else None
            yield fetched


def _step_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "big") >> 1


def _start_alike(
    tensors: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, first: int, processes: Processes
) -> None:
    """Every process starts from what the main one made or read; the others need not see the run folder."""
    processes.copy_from_main(tensors)
    if first and processes.count > 1:

        def state() -> dict:
            return tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, optimizer.state_dict())

        load_optimizer(optimizer, processes.on_main(state))


def _sources(examples: Sequence[Lesson]) -> list[str]:
    return [each.example.place for each in examples]


def _named(examples: Sequence[Lesson]) -> str:
    more = f" and {len(examples) - 8} more, all named in metrics.jsonl" if len(examples) > 8 else ""
    return ", ".join(_sources(examples[:8])) + more
