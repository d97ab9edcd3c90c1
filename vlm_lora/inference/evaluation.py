"""What an evaluation found: every answer, the scores, what tuning made better and worse, and what is still wrong."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase

from vlm_lora.data.example import Example
from vlm_lora.errors import DataError
from vlm_lora.inference.metrics.answers import plain
from vlm_lora.inference.metrics.choices import chosen
from vlm_lora.inference.scores import (
    METRICS,
    TASKS,
    WHO,
    Scores,
)
from vlm_lora.inference.scoring import Answered, by_task, level_of, mean, reference_words, values_of
from vlm_lora.inference.verdict import part_tables, score_table, summary


@dataclass(frozen=True, slots=True)
class Changes:
    """What tuning did to answers, as indices into `Evaluation.answered`."""

    better: list[int]
    """The largest gain first."""
    worse: list[int]
    """The largest loss first."""
    same: list[int]
    """Those that score the same."""

    def __str__(self) -> str:
        count = len(self.better) + len(self.worse) + len(self.same)
        return (
            f"Of {count:,} answers, tuning made {len(self.better):,} better and {len(self.worse):,} worse; "
            f"{len(self.same):,} score the same."
        )


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """What the models answered, and the scores."""

    answered: tuple[Answered, ...]
    """Every question, in the order of the data."""
    scores: Scores
    """Means and intervals; what ``vlm-lora eval --json`` prints."""
    values: dict[str, dict[str, list[float]]]
    """By who answered ("base", "tuned", ...) and by metric: the score of each answer, in the order of `answered`. It is
    NaN if there is no answer, or if the metric is not one of its task."""

    def __repr__(self) -> str:
        return f"<Evaluation of {self.scores.answers:,} answers. {' '.join(summary(self.scores))}>"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, and the tables of the report."""
        tables = [table for of in self.scores.tasks.values() for table in (score_table(of), *part_tables(of))]
        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(self.scores))
        return said + "".join(table.to_html() for table in tables)

    def write(self, folder: Path) -> None:
        """Write ``predictions.jsonl`` and ``scores.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in self.answered:
            fields = {name: getattr(row, name) for name in ("example", "question", "kind", "task", *WHO)}
            fields |= {"images": [image.name for image in row.images], "references": list(row.references)}
            fields |= {"choices": row.choices or None, "frames": row.frames or None}
            lines.append(json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False) + "\n")
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "scores.json").write_text(json.dumps(self.scores.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, examples: Sequence[Example] = ()) -> "Evaluation":
        """Read what `write` wrote. Pictures come from ``examples``; answers about other examples have none.

        Raises:
            DataError: a file is missing, or is not what `write` writes.
        """
        pictures = {example.id: example.images for example in examples}
        try:
            # Not splitlines: an answer may hold a line separator, which JSON does not escape.
            lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
            answered = []
            for row in map(json.loads, filter(None, lines)):
                images, references = pictures.get(row["example"], ()), tuple(row["references"])
                answers = {name: row.get(name) for name in WHO} | {"task": row.get("task", "")}
                answers["choices"] = tuple(row.get("choices", ()))
                answers["frames"] = tuple(map(tuple, row.get("frames", ())))
                answered.append(
                    Answered(row["example"], images, row["question"], row.get("kind"), references, **answers)
                )
            document = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            level = level_of(document["tokens"])
            document.setdefault("reference_words", reference_words(answered, level))  # came later than the others
            scores = Scores.from_json(document)
            # An earlier version wrote no task: everything was of one.
            answered = [row if row.task else replace(row, task=next(iter(scores.tasks))) for row in answered]
            return cls(tuple(answered), scores, values_of(answered, level))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{folder}: holds no evaluation that can be read ({what}); run vlm-lora eval") from error

    def ranks(self, who: str) -> list[tuple[float, ...]]:
        """What each answer is ranked by: the most telling metrics of its task. For short answers these are exact match,
        then the spelling."""
        of = self.values[who]
        return [tuple(of[key][i] for key in TASKS[row.task].ranked_by) for i, row in enumerate(self.answered)]

    def changes(self) -> Changes:
        """What tuning did to each answer. Without an adapter all are in ``same``."""
        places = list(range(len(self.answered)))
        if not self.scores.tuned:
            return Changes([], [], places)
        both = zip(self.ranks("base"), self.ranks("tuned"), strict=True)
        gains = [tuple(t - b for b, t in zip(*pair, strict=True)) for pair in both]
        places.sort(key=lambda i: self._in_full(i, gains[i]), reverse=True)
        return Changes(
            better=[i for i in places if gains[i] > (0.0,) * len(gains[i])],
            worse=[i for i in reversed(places) if gains[i] < (0.0,) * len(gains[i])],
            same=[i for i in places if not any(gains[i])],
        )

    def verdict(self) -> list[str]:
        """What the scores say, in sentences."""
        return summary(self.scores)

    def still_wrong(self) -> list[int]:
        """Indices into `answered` where the tuned model is wrong: one of each mistake, the commonest mistake first;
        then the second of each. For captions and long answers: those below the mean, the lowest first."""
        if not self.scores.tuned:
            return []
        ranks, times = self.ranks("tuned"), self.mistakes()
        orders = []
        for task, places in by_task(self.answered).items():
            first = [ranks[i][0] for i in places]
            if TASKS[task].right_or_wrong:
                nth: Counter[tuple[str, str]] = Counter()
                order = []
                for i in places:
                    if ranks[i][0] == 0:
                        mistake = self._mistake(i)
                        order.append((nth[mistake], -times[mistake], i))
                        nth[mistake] += 1
                orders.append([i for *_, i in sorted(order)])
            else:
                low = [i for i, rank in zip(places, first, strict=True) if rank < mean(first)]
                orders.append(sorted(low, key=ranks.__getitem__))
        return [i for row in zip_longest(*orders) for i in row if i is not None]

    def mistakes(self) -> Counter[tuple[str, str]]:
        """How often each (answer of the data, answer of the model) came, where the tuned model was wrong. Captions and
        long answers do not count."""
        if not self.scores.tuned:
            return Counter()
        first, rows = [rank[0] for rank in self.ranks("tuned")], enumerate(self.answered)
        return Counter(self._mistake(i) for i, row in rows if TASKS[row.task].right_or_wrong and first[i] == 0)

    def _mistake(self, place: int) -> tuple[str, str]:
        row = self.answered[place]
        if row.choices:
            told = {letter: f"{letter}. {option}" for letter, option in zip(ascii_uppercase, row.choices, strict=False)}
            said = row.answer("tuned")
            return told[row.references[0]], told.get(chosen(said, row.choices) or "", plain(said))
        return plain(Counter(row.references).most_common(1)[0][0]), plain(row.answer("tuned"))

    def _in_full(self, place: int, gain: tuple[float, ...]) -> tuple[float, ...]:
        """A gain as a share of the most that there can be, to compare those of several tasks."""
        full = METRICS[TASKS[self.answered[place].task].ranked_by[0]].full
        return (gain[0] / full, *gain[1:])
