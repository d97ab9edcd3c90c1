"""The losses that a run wrote into its folder."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """(step, loss) by step: of each step's training data, and of the held-out data now and then."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def read_losses(run: Path) -> Losses:
    """The losses in a run folder's ``metrics.jsonl``; none without the file. A line that was cut off is passed over."""
    losses, file = Losses(), run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            for name, points in (("loss", losses.training), ("held_out_loss", losses.held_out)):
                if math.isfinite(row.get(name, math.nan)):
                    points.append((int(row["step"]), float(row[name])))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return Losses(sorted(losses.training), sorted(losses.held_out))
