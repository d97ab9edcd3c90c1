"""What a run prints while it works: to stderr, one line rewritten on a terminal, now and then a new one elsewhere."""

import os
import signal
import sys
import time


def size(num_bytes: float) -> str:
    """In the unit a person would take: "812 kB", "3.2 MB", "14.0 GB"."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= one:
            return f"{num_bytes / one:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def one_line(text: str, most: int | None = None) -> str:
    """Text that names data, for a terminal: what would clear the screen or turn the line round is escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def process_index() -> int:
    """Which process of a run on several this is, as ``torchrun`` and ``accelerate launch`` tell it; only 0 speaks."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Whether this is one of several processes of a run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def to_stderr(text: str, end: str = "\n") -> None:
    """Print, from whichever process. Where that cannot be, as behind ``2>&1 | head`` or once the terminal is closed,
    nothing is printed any more: the work goes on."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def say(text: str) -> None:
    if process_index() == 0:
        to_stderr(text)


class Progress:
    """A line that tells how far something is. Off a terminal a line is printed every ten seconds and at the end."""

    def __init__(self, every: float = 10.0):
        self.terminal = sys.stderr.isatty() and process_index() == 0
        self.pause = 0.1 if self.terminal else every
        self.last = 0.0
        self.width = 0

    def show(self, text: str, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.last < self.pause:
            return
        self.last = now
        if self.terminal:
            to_stderr("\r" + text.ljust(self.width), end="\n" if last else "")
            self.width = 0 if last else len(text)
        else:
            say(text)

    def count(self, what: str, done: int, total: int) -> None:
        self.show(f"{what} {done:,} of {total:,}", last=done == total)


STOPPING = [getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "USR1", "HUP") if hasattr(signal, f"SIG{name}")]
"""``kill`` and schedulers, Ctrl-C, SLURM, a terminal that is closed; Windows has the first two only."""


class StopSignals:
    """Once caught, the first signal of `STOPPING` is remembered; then SIGTERM or SIGINT ends the program at once, and
    the others, which come twice from one cause, do nothing. Under ``nohup`` SIGHUP stays ignored.

    Not so under a launcher: it sends its own to every process as soon as one has ended, and kills after 30 seconds.
    """

    def __init__(self):
        self.number: int | None = None
        self.before: dict[int, object] = {}

    def catch(self) -> None:
        for number in STOPPING:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._remember)

    def release(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> int | None:
        return self.number

    def _remember(self, number: int, frame) -> None:
        self.number = number
        if launched():
            say("\nStopping: all processes finish this step, and it is saved.")
            return
        for caught in self.before:
            now = caught in (signal.SIGTERM, signal.SIGINT)
            signal.signal(caught, signal.SIG_DFL if now else signal.SIG_IGN)
        say("\nStopping: this step is finished and saved. Once more ends it at once.")


class TrainReport:
    """Prints what `vlm_lora.train` reports, and catches signals from the first step on: before, nothing can be lost."""

    def __init__(self, signals: StopSignals):
        self.progress = Progress()
        self.signals = signals

    def __call__(self, kind: str, **values) -> None:
        getattr(self, kind)(**values)

    def data(self, format, train, held_out, bad) -> None:
        answers = sum(example.weight * len(example.dialogues) for example in train)
        say(f"Data: {format}. {len(train):,} images with {answers:,} answers to learn; {len(held_out):,} held out.")
        if bad:
            say(f"{len(bad):,} rows cannot be used; they are listed in the run folder's quarantined.jsonl.")

    def folder(self, folder) -> None:
        say(f"Run folder: {folder}")

    def parts(self, parts, model, device, dtype) -> None:
        say(f"Base model {model} on {device}, {dtype.removeprefix('torch.')}. What trains:")
        say(f"  {'part':<22}{'adapted':>14}{'trained':>14}{'frozen':>16}")
        for part in parts:
            say(f"  {part.name:<22}{part.modules:>14,}{part.trained:>14,}{part.frozen:>16,}")

    def tokens(self, done, total) -> None:
        self.progress.count("Examples in tokens:", done, total)

    def survey(self, survey, folder, seen_once) -> None:
        images = f"{survey.images:,} images, {size(survey.num_bytes)}"
        if folder is None:
            say(f"Vision tower: {images} of features, kept in memory only.")
        elif seen_once:
            say(f"Vision tower: each image is seen once, so that its features ({images}) are not kept.")
        else:
            say(f"Feature cache: {images} on disk in {folder}; {survey.missing:,} images are still to be computed.")
            if survey.missing_bytes > survey.room:
                say(
                    f"  There is room for {size(survey.room)} of {size(survey.missing_bytes)}; the other images go "
                    "through the tower each time. --cache-gb or a larger disk ($VLM_LORA_CACHE) saves that."
                )

    def cache(self, done, total) -> None:
        self.progress.count("Images prepared:", done, total)

    def start(self, step, num_steps, answers, parameters, processes, sharded, imbalance) -> None:
        self.signals.catch()
        say(f"{num_steps:,} steps over {answers:,} answers." + (f" Going on from step {step:,}." if step else ""))
        if processes > 1:
            pieces = ", the base's layers in pieces (FSDP2)" if sharded else ""
            share = f"the busiest has {imbalance:.2f} times the mean of tokens"
            say(f"{processes} processes share each step{pieces}; {share}.")
            if imbalance > 1.25:
                say("The others wait for it. A larger --batch-size spreads more evenly.")

    def step(self, step, num_steps, loss, lr, answers_per_second, seconds_left, **_) -> None:
        rate = f"{answers_per_second:,.0f}" if answers_per_second >= 10 else f"{answers_per_second:.2g}"
        text = f"step {step:,}/{num_steps:,}  loss {loss:.4f}  lr {lr:.1e}  {rate} answers/s"
        self.progress.show(f"{text}  {duration(seconds_left)} left", last=step == num_steps)

    def held_out(self, step, loss) -> None:
        self.progress.show(f"step {step:,}  held-out loss {loss:.4f}", last=True)

    def best(self, step, loss, last, num_steps) -> None:
        early = f"Stopped early behind step {last:,} of {num_steps:,}. " if last < num_steps else ""
        say(f"{early}The held-out loss was lowest, {loss:.4f}, behind step {step:,}: the adapter is that step's.")

    def cost(self, predicted, seconds, measured) -> None:
        work, taken = predicted.operations + predicted.tower_operations, measured["seconds"]
        rate = work / taken / measured["devices"] / 1e12
        say(f"{work / 1e12:,.3g} TFLOP were planned, and took {duration(taken)}: {rate:,.3g} TFLOP/s a device.")
        if seconds is not None:
            say(f"{duration(seconds)} were predicted from steps 2 and 3, with nothing for held-out losses and saving.")
        if "memory_bytes" in measured:
            peak, planned = measured["memory_bytes"] / 1e9, predicted.memory / 1e9
            say(f"Memory at its highest: {peak:,.1f} GB; {planned:,.1f} GB were planned.")

    def warning(self, text) -> None:
        say(f"Warning: {text}")
