"""Base against tuned on held-out images: every question answered by both, scored, with intervals.

Both answers come from one loaded model, with the adapter switched off and on, from the same image features and by
the same greedy decoding. Intervals are bootstrapped over images, as answers about one image are not independent.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_lora.data.example import Example, ImageRef, Turn
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError
from vlm_lora.inference import metrics
from vlm_lora.inference.captioner import Captioner, Decoding

ROWS_AT_ONCE = 96
"""Questions decoded together."""

WHOLE_SCALE = {"cider_d": 10.0}
"""Metrics whose best value is not 1."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question about one example, its references, and what each model said.

    ``base``, ``tuned`` and ``blanked`` (tuned, shown a plain grey image of the same size) are None where not asked.
    """

    example: str
    images: tuple[ImageRef, ...]
    question: str
    kind: str | None
    references: tuple[str, ...]
    base: str | None
    tuned: str | None
    blanked: str | None = None

    def said(self, who: str) -> str | None:
        return getattr(self, who)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was answered, and the scores.

    ``scores`` is what ``eval --json`` prints: numbers of ``examples`` and ``answers``; for each of ``base``,
    ``tuned``, ``blanked`` its metrics; ``intervals`` of each; ``gain`` of tuned over base with interval and p-value;
    ``by_kind``, the exact match of each kind of question.
    """

    answered: tuple[Answered, ...]
    scores: dict
    values: dict[str, dict[str, list[float]]]
    """For each of base, tuned, blanked, and each metric that has one: a value an answer, as in ``answered``."""

    def write(self, folder: Path) -> None:
        """``predictions.jsonl`` and ``scores.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in self.answered:
            fields = {name: row.said(name) for name in ("example", "question", "kind", "base", "tuned", "blanked")}
            fields |= {"images": [image.name for image in row.images], "references": list(row.references)}
            lines.append(json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False) + "\n")
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "scores.json").write_text(json.dumps(self.scores, indent=2) + "\n", encoding="utf-8")


def evaluate(
    captioner: Captioner,
    examples: Sequence[Example],
    *,
    blanked: bool = False,
    decoding: Decoding | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answer every question of every example with base and tuned model, and score both.

    Dialogues of one example that ask the same are one question with several references (a COCO image's five captions).

    Args:
        blanked: also answer with the tuned model and a plain grey image in each image's place: what the answer owes to
            the picture is the difference.
        progress: called with the number of passes over a question done and their total.
    """
    if not examples:
        raise ConfigError(
            "There are no held-out examples to evaluate on. Give some with --val or a higher --val-split."
        )
    passes = (
        ["base"] + (["tuned"] if captioner.adapter else []) + (["blanked"] if blanked and captioner.adapter else [])
    )
    questions = [_questions(example) for example in examples]
    total = len(passes) * sum(map(len, questions))
    said: dict[str, list[list[str]]] = {name: [[] for _ in examples] for name in passes}
    done = 0
    for name in passes:
        for group in _groups(questions, ROWS_AT_ONCE):
            asked = []
            for i in group:
                images = [_blank(image) for image in examples[i].images] if name == "blanked" else examples[i].images
                asked.append((captioner.features.get(images), [turns for turns, _, _ in questions[i]]))
            for i, answers in zip(
                group, captioner.generate(asked, tuned=name != "base", decoding=decoding), strict=True
            ):
                said[name][i] = answers
                done += len(answers)
            progress(done, total)
    answered = [
        Answered(
            example.id,
            example.images,
            turns[-1].user,
            kind,
            references,
            **{name: said[name][i][q] if name in said else None for name in ("base", "tuned", "blanked")},
        )
        for i, example in enumerate(examples)
        for q, (turns, kind, references) in enumerate(questions[i])
    ]
    references = [row.references for row in answered]
    values = {name: per_answer([row.said(name) for row in answered], references) for name in passes}
    return Evaluation(tuple(answered), summarize(answered, values), values)


def _questions(example: Example) -> list[tuple[tuple[Turn, ...], str | None, tuple[str, ...]]]:
    """What is asked about an example: (turns, kind, references), dialogues that ask the same put together."""
    gathered: dict[tuple, tuple[tuple[Turn, ...], str | None, list[str]]] = {}
    for dialogue in example.dialogues:
        last = dialogue.turns[-1]
        asked = (*dialogue.turns[:-1], Turn(last.user, ""))
        _, _, references = gathered.setdefault(asked, (asked, dialogue.kind, []))
        references += dialogue.accepted or (last.assistant,)
    return [(turns, kind, tuple(references)) for turns, kind, references in gathered.values()]


def _groups(questions: Sequence[Sequence], rows: int) -> list[list[int]]:
    """Indices of examples in order, gathered while their questions are at most ``rows``."""
    groups: list[list[int]] = []
    room = 0
    for i, asked in enumerate(questions):
        if not groups or len(asked) > room:
            groups.append([])
            room = rows
        groups[-1].append(i)
        room -= len(asked)
    return groups


def _blank(image: ImageRef) -> Image.Image:
    return Image.new("RGB", load_image(image).size, (128, 128, 128))


def per_answer(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Every metric that has a value for each answer."""
    return {
        "exact_match": [metrics.exact_match(c, r) for c, r in zip(candidates, references, strict=True)],
        "vqa_accuracy": [metrics.vqa_accuracy(c, r) for c, r in zip(candidates, references, strict=True)],
        "anls": [metrics.anls(c, r) for c, r in zip(candidates, references, strict=True)],
        "cider_d": metrics.cider_d(candidates, references),
        "rouge_l": metrics.rouge_l(candidates, references),
    }


def summarize(answered: Sequence[Answered], values: dict[str, dict[str, list[float]]]) -> dict:
    """The ``scores`` of an `Evaluation` from each answer's values."""
    passes = list(values)
    references = [row.references for row in answered]
    groups = [row.example for row in answered]
    scores: dict = {"examples": len(set(groups)), "answers": len(answered), "intervals": {}}
    for name in passes:
        candidates = [row.said(name) for row in answered]
        scores[name] = {metric: sum(v) / len(v) for metric, v in values[name].items()}
        for order, value in enumerate(metrics.bleu(candidates, references), start=1):
            scores[name][f"bleu_{order}"] = value
        scores[name]["mean_words"] = metrics.mean_length(candidates)
        scores[name]["distinct"] = metrics.distinct_share(candidates)
        scores["intervals"][name] = {
            metric: list(metrics.bootstrap_interval(v, groups=groups)) for metric, v in values[name].items()
        }
    if "tuned" in passes:
        scores["gain"] = {
            metric: metrics.paired_bootstrap(values["base"][metric], values["tuned"][metric], groups=groups)._asdict()
            for metric in values["base"]
        }
    kinds = sorted({row.kind for row in answered if row.kind})
    scores["by_kind"] = {}
    for kind in kinds:
        of_kind = [i for i, row in enumerate(answered) if row.kind == kind]
        scores["by_kind"][kind] = {"answers": len(of_kind)} | {
            name: sum(values[name]["exact_match"][i] for i in of_kind) / len(of_kind) for name in passes
        }
    return scores


def headline(scores: dict) -> list[str]:
    """The metrics worth a look: exact match and the like for short answers, CIDEr-D and company for captions."""
    who = scores.get("tuned") or scores["base"]
    return ["cider_d", "bleu_4", "rouge_l"] if who["mean_words"] > 4 else ["exact_match", "vqa_accuracy", "anls"]


def table(scores: dict) -> str:
    """The scores as plain text: a line a metric, base and tuned with intervals, and the gain."""
    passes = [name for name in ("base", "tuned", "blanked") if name in scores]
    titles = {"base": "base", "tuned": "tuned", "blanked": "tuned, image blanked"}
    lines = [["", *[titles[name] for name in passes], *(["gain (95 % interval)"] if "gain" in scores else [])]]
    for metric in headline(scores):
        line = [metric.replace("_", " ")]
        for name in passes:
            interval = scores["intervals"][name].get(metric)
            line.append(_number(metric, scores[name][metric]) + (_interval(metric, interval) if interval else ""))
        if gain := scores.get("gain", {}).get(metric):
            line.append(f"{_number(metric, gain['gain'], sign=True)}{_interval(metric, (gain['low'], gain['high']))}")
        lines.append(line)
    for kind, row in scores["by_kind"].items():
        lines.append(
            [f"exact match, {kind} ({row['answers']})", *[_number("exact_match", row[name]) for name in passes]]
        )
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def _number(metric: str, value: float, sign: bool = False) -> str:
    """Fractions as percent, CIDEr-D as it is."""
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    if metric in WHOLE_SCALE:
        return text
    return (f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}") + " %"


def _interval(metric: str, interval: Sequence[float]) -> str:
    low, high = interval
    if metric in WHOLE_SCALE:
        return f" ({low:.2f} to {high:.2f})"
    return f" ({100 * low:.1f} to {100 * high:.1f})"
