"""How far chance may have moved a score: intervals around it, and a paired test of two models."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm_lora.inference.metrics.captions import BleuStats, bleu_from_stats


class Interval(NamedTuple):
    """Where a score lies with 95 % confidence, in the unit of the score."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Tuned minus base, the interval around it, and the two-sided p-value of there being no difference."""

    gain: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Percentile bootstrap intervals (Efron, Tibshirani 1993, "An Introduction to the Bootstrap") of scores, and
    paired tests (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").

    A p-value is twice the share of resamples on the other side of 0 than the gain, with one added to both counts, so
    it is never below 2 / (resamples + 1).

    Attributes:
        groups: the image (or any key) of each sample. Answers about one image are not independent: whole groups are
            drawn, a mean stays a mean over samples. A single group gives an interval of no width.
        level: the intervals' coverage, between 0 and 1.
    """

    groups: Sequence[Hashable] | None = None
    seed: int = 0
    resamples: int = 2000
    level: float = 0.95

    def interval(self, values: Sequence[float]) -> Interval:
        """The interval of a mean; ``values`` has one score per sample."""
        return self.intervals([values])[0]

    def intervals(self, lines: Sequence[Sequence[float]]) -> list[Interval]:
        """Those of several means over the same samples, by the same resamples."""
        return [self._interval(drawn) for drawn in self._means(lines)]

    def gain(self, base: Sequence[float], tuned: Sequence[float]) -> Gain:
        """The difference of two models' means over the same samples in the same order."""
        return self.gains([(base, tuned)])[0]

    def gains(self, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Gain]:
        """Those of several pairs of base and tuned, by the same resamples."""
        gained = []
        for base, tuned in pairs:
            if len(base) != len(tuned):
                raise ValueError(f"paired samples: {len(base)} of base, {len(tuned)} of tuned")
            gained.append([float(after) - float(before) for before, after in zip(base, tuned, strict=True)])
        drawn = self._means(gained)
        return [self._gain(sum(line) / len(line), of) for line, of in zip(gained, drawn, strict=True)]

    def bleu_intervals(self, stats: Sequence[BleuStats]) -> list[Interval]:
        """The intervals of corpus BLEU-1, -2, -3, -4 from `bleu_stats` of each sample."""
        drawn = [bleu_from_stats([sums]) for sums in self._sums(stats)]
        return [self._interval(of_order) for of_order in zip(*drawn, strict=True)]

    def bleu_gains(self, base: Sequence[BleuStats], tuned: Sequence[BleuStats]) -> list[Gain]:
        """The differences of two models' corpus BLEU-1, -2, -3, -4 from `bleu_stats` of the same samples."""

        def gains(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> list[float]:
            return [t - b for b, t in zip(bleu_from_stats(before), bleu_from_stats(after), strict=True)]

        both = [(*before, *after) for before, after in zip(base, tuned, strict=True)]
        middle = len(base[0])
        drawn = [gains([sums[:middle]], [sums[middle:]]) for sums in self._sums(both)]
        return [self._gain(*of_order) for of_order in zip(gains(base, tuned), zip(*drawn, strict=True), strict=True)]

    def _means(self, lines: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of each line the mean of each resample."""
        if not all(math.isfinite(value) for line in lines for value in line):
            raise ValueError("cannot bootstrap values that are not finite")
        if not lines:
            return []
        rows = [(1, *values) for values in zip(*lines, strict=True)]
        counts, *totals = zip(*self._sums(rows), strict=True)
        return [[total / count for total, count in zip(of, counts, strict=True)] for of in totals]

    def _sums(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The sum of the rows of each resample. Rows are summed by group first: groups are then cheap to draw."""
        if not rows or self.resamples < 1 or not 0 < self.level < 1:
            raise ValueError(f"cannot bootstrap {len(rows)} samples, {self.resamples} resamples, level {self.level}")
        groups = range(len(rows)) if self.groups is None else self.groups
        if len(groups) != len(rows):
            raise ValueError(f"{len(groups)} groups for {len(rows)} samples")
        sums: dict[Hashable, list[float]] = {}
        for group, row in zip(groups, rows, strict=True):
            sums[group] = [a + b for a, b in zip(sums[group], row, strict=True)] if group in sums else list(row)
        table, random = np.array(list(sums.values()), dtype=float), np.random.default_rng(self.seed)
        return [table[random.integers(len(table), size=len(table))].sum(0).tolist() for _ in range(self.resamples)]

    def _interval(self, drawn: Iterable[float]) -> Interval:
        ordered = sorted(drawn)
        places = np.array([(1 - self.level) / 2, (1 + self.level) / 2]) * (len(ordered) - 1)
        # Not np.quantile: its last bit differs, and scores would not equal those of earlier versions.
        return Interval(*np.interp(places, np.arange(len(ordered)), ordered).tolist())

    def _gain(self, gain: float, drawn: Sequence[float]) -> Gain:
        rounding = 1e-12  # sums that should be 0 and are not quite
        tail = min(sum(value <= rounding for value in drawn), sum(value >= -rounding for value in drawn))
        return Gain(gain, *self._interval(drawn), min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))
