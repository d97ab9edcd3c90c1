"""The losses that a run wrote into its folder."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a run, as (step, loss) by step. A loss is the mean over the learnt tokens, in nats per token."""

    training: list[tuple[int, float]] = field(default_factory=list)
    """Of each step's training data, before its update."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Of the held-out images, or a sample of them, at each checkpoint."""
    sample: tuple[int, int] | None = None
    """The size of that sample and the number of held-out images, at the last checkpoint; None if all are scored."""
    of_all: float | None = None
    """The loss of all held-out images under the final adapter, if `held_out` is of a sample."""

    @property
    def held_out_of(self) -> str:
        """Which images `held_out` is of, in words: "all images", or "sample of 16 of 200 images"."""
        return sample_of(*self.sample) if self.sample else "all images"


def sample_of(images: int, of: int) -> str:
    return f"sample of {images:,} of {of:,} images"


def read_losses(run: str | Path) -> Losses:
    """The losses in a run folder's ``metrics.jsonl``. Without the file there are none; a line that was cut off is
    skipped."""
    losses, file = Losses(), Path(run) / "metrics.jsonl"
    sample, of_all = None, None
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            for name, points in (("loss", losses.training), ("held_out_loss", losses.held_out)):
                if math.isfinite(row.get(name, math.nan)):
                    points.append((int(row["step"]), float(row[name])))
            if "held_out_loss" in row and "held_out_images" in row:
                images, of = int(row["held_out_images"]), int(row["held_out_of"])
                sample = (images, of) if images < of else None
            if "held_out_loss_of_all" in row:
                of_all = float(row["held_out_loss_of_all"])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return Losses(sorted(losses.training), sorted(losses.held_out), sample, of_all)
