"""What commands print: to stderr, one line rewritten on a terminal, now and then a new one elsewhere.

In a notebook it goes into the cell's output, and progress is a bar.
"""

import os
import signal
import sys
import time
from html import escape
from typing import Any


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


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def to_stderr(text: str, end: str = "\n") -> None:
    """Print, from whichever process. Where that cannot be, as behind ``2>&1 | head`` or once the terminal is closed,
    nothing is printed any more: the work goes on."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def say(text: str) -> None:
    if in_notebook():
        print(text, flush=True)  # stderr is red there
    elif process_index() == 0:
        to_stderr(text)


class Progress:
    """A line that tells how far something is. Off a terminal a line is printed every ten seconds and at the end.

    In a notebook it is a bar: one for all that is counted, which stays when the last is done.
    """

    def __init__(self, every: float = 10.0):
        self.notebook = in_notebook()
        self.terminal = sys.stderr.isatty() and process_index() == 0 and not self.notebook
        self.pause = 0.1 if self.terminal or self.notebook else every
        self.last = 0.0
        self.width = 0
        self.bar: Any = None

    def show(self, text: str, last: bool = False, share: float | None = None) -> None:
        """``share`` is how much is done, from 0 to 1."""
        now = time.monotonic()
        if not last and now - self.last < self.pause:
            return
        self.last = now
        if self.notebook:
            self._draw(text, share)
        elif self.terminal:
            to_stderr("\r" + text.ljust(self.width), end="\n" if last else "")
            self.width = 0 if last else len(text)
        else:
            say(text)

    def count(self, what: str, done: int, total: int) -> None:
        self.show(f"{what} {done:,} of {total:,}", last=done == total, share=done / max(1, total))

    def _draw(self, text: str, share: float | None) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]  # a notebook has it

        bar = "" if share is None else f'<progress max="1" value="{share:.4f}" style="width: 12em"></progress> '
        shown = HTML(f"{bar}<code>{escape(text)}</code>")
        if self.bar is None:
            self.bar = display(shown, display_id=True)
        else:
            self.bar.update(shown)


STOPPING = [getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "USR1", "HUP") if hasattr(signal, f"SIG{name}")]
"""``kill`` and schedulers, Ctrl-C, SLURM, a terminal that is closed; Windows has the first two only."""


class StopSignals:
    """Once caught, the first signal of `STOPPING` is remembered; then SIGTERM or SIGINT ends the program at once, and
    the others, which come twice from one cause, do nothing. Under ``nohup`` SIGHUP stays ignored.

    Not so under a launcher: it sends its own to every process as soon as one has ended, and kills after 30 seconds.
    """

    def __init__(self):
        self.number: int | None = None
        self.before: dict[int, Any] = {}

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
