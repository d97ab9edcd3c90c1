"""What a run prints while it trains, on the command line and in notebooks."""

import numpy as np

from vlm_lora.console import Progress, StopSignals, duration, one_line, say, size
from vlm_lora.data.examples import Examples
from vlm_lora.inference.losses import sample_of
from vlm_lora.training.events import Events


class TrainReport(Events):
    """Prints what happens. Given ``signals``, catches them from the first step on: before, nothing can be lost."""

    def __init__(self, signals: StopSignals | None = None):
        self.progress = Progress()
        self.signals = signals
        self.sampled = False
        self.said = ""

    def data(self, format, train, held_out, bad) -> None:
        train = Examples.of(train)
        answers, with_images = train.num_answers * train.weights, [bool(images) for images in train.images]
        answers, text_only, pictured = answers.sum(), answers[~np.array(with_images, bool)].sum(), sum(with_images)
        beside = f" and {text_only:,} of text alone" if text_only else ""
        counts = f"{pictured:,} images with {answers - text_only:,} answers{beside} to learn"
        say(f"Data: {format}. {counts}; {len(held_out):,} held out.")
        if bad:
            say(f"{len(bad):,} rows cannot be used; they are listed in the run folder's quarantined.jsonl.")

    def folder(self, folder) -> None:
        say(f"Run folder: {folder}")

    def parts(self, adapter, model) -> None:
        dtype = str(adapter.backbone.dtype).removeprefix("torch.")
        say(f"Base model {model} on {adapter.backbone.device}, {dtype}. What trains:")
        say(f"  {'part':<22}{'adapted':>14}{'trained':>14}{'frozen':>16}")
        for part in adapter.parts():
            say(f"  {part.name:<22}{part.modules:>14,}{part.trained:>14,}{part.frozen:>16,}")

    def looks(self, done, total) -> None:
        self.progress.count("Images checked:", done, total)

    def tokens(self, done, total) -> None:
        self.progress.count("Tokens counted, examples:", done, total)

    def survey(self, survey, folder, seen_once) -> None:
        images = f"{survey.images:,} images, {size(survey.num_bytes)}"
        if folder is None:
            say(f"Vision tower: {images} of features, kept in memory only.")
        elif seen_once:
            say(f"Vision tower: each image is seen once, so that its features ({images}) are not kept.")
        else:
            say(f"Feature cache: {images} on disk in {folder}; {survey.missing:,} images are not in it yet.")
            if survey.missing_bytes > survey.room:
                say(
                    f"  There is room for {size(survey.room)} of {size(survey.missing_bytes)}; the other images go "
                    "through the tower each time. --cache-gb or a larger disk ($VLM_LORA_CACHE) saves that."
                )

    def cache(self, done, total) -> None:
        self.progress.count("Images prepared:", done, total)

    def start(self, *, step, num_steps, answers, parameters, processes, sharded, imbalance) -> None:
        if self.signals:
            self.signals.catch()
        say(f"{num_steps:,} steps over {answers:,} answers." + (f" Resumed from step {step:,}." if step else ""))
        if processes > 1:
            pieces = ", the base's layers in pieces (FSDP2)" if sharded else ""
            share = f"the busiest has {imbalance:.2f} times the mean of tokens"
            say(f"{processes} processes share each step{pieces}; {share}.")
            if imbalance > 1.25:
                say("The others wait for it. A larger --batch-size spreads more evenly.")

    def compiling(self) -> None:
        say("torch.compile runs now, for a minute or two; --compile no starts at once.")

    def step(self, *, step, num_steps, loss, lr, answers_per_second, seconds_left, **_) -> None:
        rate = f"{answers_per_second:,.0f}" if answers_per_second >= 10 else f"{answers_per_second:.2g}"
        text = f"step {step:,}/{num_steps:,}  loss {loss:.4f}  lr {lr:.1e}  {rate} answers/s"
        left = duration(seconds_left)
        self.progress.show(f"{text}  {left} left", last=step == num_steps, share=step / num_steps)

    def sample(self, *, images, of, share, steps) -> None:
        self.sampled = True
        say(
            f"Held-out loss at each checkpoint: {sample_of(images, of)}, always the same, {share:.1%} of the work of "
            f"the steps between two; of all once at the end, the work of {steps:,.0f} steps. --val-images N changes it."
        )

    def held_out(self, *, step, loss, images, of) -> None:
        whole = f", all {of:,} images" if self.sampled else ""
        told = f", {sample_of(images, of)}" if images < of else whole
        self.progress.show(f"step {step:,}  held-out loss {loss:.4f}{told}", last=True)

    def watching(self, *, images, share) -> None:
        if images:
            pictures = "1 held-out picture is" if images == 1 else f"{images} held-out pictures are"
            text = (
                f"{pictures} captioned at the start and at each checkpoint, {share:.1%} of the operations of the steps"
            )
            say(f"Watch it learn: {text}; --watch 0 leaves that out.")
        else:
            say(
                f"Watch it learn: off, as the captions of one picture would take {share:.0%} of the operations of so "
                "few steps. --watch 4 insists."
            )

    def watched(self, *, step, captions) -> None:
        shown = captions[0]
        if shown["caption"] != self.said:  # one of them, as it changes
            name, said = one_line(shown["image"], 40), one_line(shown["caption"], 160)
            self.progress.show(f"step {step:,}  {name}: {said or 'nothing'}", last=True)
        self.said = shown["caption"]

    def scoring(self, done, total) -> None:
        self.progress.count("Held-out images scored:", done, total)

    def best(self, *, step, loss, images, of, last, num_steps) -> None:
        early = f"Stopped early after step {last:,} of {num_steps:,}. " if last < num_steps else ""
        told = f" ({sample_of(images, of)})" if images < of else ""
        say(f"{early}The held-out loss{told} was lowest, {loss:.4f}, after step {step:,}: the adapter is that step's.")

    def cost(self, predicted, seconds, measured) -> None:
        work = predicted.operations + predicted.tower_operations + predicted.held_out_operations
        taken = measured.seconds
        rate = work / taken / measured.devices / 1e12
        told = f"; {duration(seconds)} were predicted from steps 2 and 3, without saving" if seconds is not None else ""
        say(f"Time: {duration(taken)}{told}. {work / 1e12:,.3g} TFLOP of work, {rate:,.3g} TFLOP/s a device.")
        parts = ", ".join(f"{name} {size(part)}" for name, part in predicted.memory_by_part.items())
        expected = f"{size(predicted.memory)} were predicted: {parts}"
        if measured.memory_bytes is not None:
            reserved = f", {size(measured.reserved_bytes)} reserved" if measured.reserved_bytes else ""
            say(f"Memory at its highest: {size(measured.memory_bytes)} used{reserved} by torch; {expected}.")
        elif measured.process_bytes is not None:
            whole = f"{size(measured.process_bytes)}, of the whole process with PyTorch itself"
            say(f"Memory at its highest: {whole}. Without that, {expected}.")

    def comparison(self, done, total) -> None:
        self.progress.count("Comparing base and tuned:", done, total)

    def warning(self, text) -> None:
        say(f"Warning: {text}")
