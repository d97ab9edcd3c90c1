"""The losses that a run wrote into its folder, and the memory that it took."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """(step, loss) by step: of each step's training data, and of the held-out data at each checkpoint."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    sample: tuple[int, int] | None = None
    """How many held-out images those are of, and of how many, at the last checkpoint; None: of all."""
    of_all: float | None = None
    """The loss of all held-out images by the final adapter, where the others are of a sample."""

    @property
    def held_out_of(self) -> str:
        """What the held-out losses are of, in words."""
        return sample_of(*self.sample) if self.sample else "all images"


def sample_of(images: int, of: int) -> str:
    return f"sample of {images:,} of {of:,} images"


def read_losses(run: Path) -> Losses:
    """The losses in a run folder's ``metrics.jsonl``; none without the file. A line that was cut off is passed over."""
    losses, sample, of_all = Losses(), None, None
    for row in _rows(run):
        try:
            for name, points in (("loss", losses.training), ("held_out_loss", losses.held_out)):
                if math.isfinite(row.get(name, math.nan)):
                    points.append((int(row["step"]), float(row[name])))
            if "held_out_loss" in row and "held_out_images" in row:
                images, of = int(row["held_out_images"]), int(row["held_out_of"])
                sample = (images, of) if images < of else None
            if "held_out_loss_of_all" in row:
                of_all = float(row["held_out_loss_of_all"])
        except (ValueError, TypeError, KeyError):
            continue
    return Losses(sorted(losses.training), sorted(losses.held_out), sample, of_all)


def read_memory(run: Path) -> tuple[Mapping[str, float], Mapping[str, int]] | None:
    """Bytes that were predicted, by part, and bytes that were measured, by what they are of; None where the run has not
    come to its end, or is of an earlier release."""
    for row in reversed(list(_rows(run))):
        try:
            parts, measured = row["predicted"]["memory_by_part"], row["measured"]
            found = {title: measured[name] for name, title in MEASURED.items() if name in measured}
            return {name: float(size) for name, size in parts.items()}, found
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


MEASURED = {
    "memory_bytes": "used at the highest",
    "reserved_bytes": "reserved by torch, which keeps more than it uses",
    "process_bytes": "the whole process, at its highest",
}
"""Names in metrics.jsonl, and what they are of."""


def _rows(run: Path) -> Iterator[dict]:
    """The lines of a run's ``metrics.jsonl``, but for what is cut off."""
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
