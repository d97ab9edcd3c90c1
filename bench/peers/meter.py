"""What a run tells of itself. The standard library only: every tool's own environment runs it."""

import json
import sys
import time
from pathlib import Path


class Meter:
    """Seconds, CPU seconds, memory and losses of one run of training in this process.

    ``job`` holds ``spawned``, when the process was started (seconds since the epoch), and ``result``, the file to
    write.
    """

    def __init__(self, job: dict):
        self.job = job
        self.losses: list[float] = []
        self.marks: list[float] = []
        self.prepared = 0.0

    def begin(self) -> None:
        """Everything is loaded; from here on the time counts as training."""
        self.startup = time.time() - self.job["spawned"]
        self.base = start_peak()
        self.clock, self.cpu = time.perf_counter(), time.process_time()

    def steps_begin(self) -> None:
        """What came since `begin`, such as filling a cache, was no step yet."""
        self.prepared = time.perf_counter() - self.clock

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.marks.append(round(time.perf_counter() - self.clock - self.prepared, 4))
        self.cpu_seconds = time.process_time() - self.cpu

    def end(self) -> None:
        result = {
            "startup": round(self.startup, 2),
            "prepare": round(self.prepared, 4),
            "steps": self.marks,
            "cpu": round(self.cpu_seconds, 3),
            "base_bytes": self.base,
            "peak_bytes": resident("VmHWM"),
            "losses": self.losses,
        }
        Path(self.job["result"]).write_text(json.dumps(result), encoding="utf-8")


def read_weights(model) -> None:
    """Have the weights in main memory. Loading only maps the file, and they would be counted to the first step."""
    for parameter in model.parameters():
        parameter.detach().sum()


def start_peak() -> int:
    """Have the highest memory of this process, ``VmHWM``, count from here on; the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of this process in main memory: now (``VmRSS``), or at most so far (``VmHWM``). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def read_job() -> dict:
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_rows(job: dict) -> list[dict]:
    """The answers in the order in which they are to be learnt: image (a path), question, answer."""
    return [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
