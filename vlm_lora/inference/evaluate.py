"""Base against tuned on held-out images: every question answered by both, scored, with intervals.

Both answers come from one loaded model, with the adapter switched off and on, from the same image features and by
the same greedy decoding. Intervals are bootstrapped over images, as answers about one image are not independent.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from vlm_lora.data.example import Example, ImageRef, Turn
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference import metrics
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner

ROWS_AT_ONCE = 96
"""Questions decoded together."""

FEW_IMAGES = 20
"""Below this, an interval over images says little."""

WHOLE_SCALE = {"cider_d": 10.0}
"""Metrics whose best value is not 1."""

BLEU = tuple(f"bleu_{order}" for order in range(1, metrics.MAX_ORDER + 1))

STATISTICS = (
    ("mean_words", "words per answer", "{:.1f}"),
    ("distinct", "answers that differ", "{:.0%}"),
    ("repetition", "repeats itself", "{:.1%}"),
)
"""What is told of answers beside their scores: key, name, form."""


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
    ``by_kind``, for each kind of question the exact match of each, and their ``vqa_accuracy``; ``tokens``, what the
    metrics took for a word; ``reference_words``, how many of them the data's answers have in the mean; ``failed``, the
    examples left out because an image cannot be used; ``also``, the scores on the other data; ``base_in_four_bits``,
    where base and tuned are that base's.
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

    @classmethod
    def read(cls, folder: Path, examples: Sequence[Example] = ()) -> "Evaluation":
        """What `write` wrote. Pictures are those of ``examples``; answers about any other example have none.

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
                said = [row.get(name) for name in ("base", "tuned", "blanked")]
                answered.append(Answered(row["example"], images, row["question"], row.get("kind"), references, *said))
            scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            passes = [name for name in ("base", "tuned", "blanked") if name in scores]
            references = [row.references for row in answered]
            level = {tokens: level for level, tokens in metrics.TOKENIZER_ID.items()}[scores["tokens"]]
            values = {name: per_answer([row.said(name) for row in answered], references, level) for name in passes}
            scores.setdefault("reference_words", _words_of_references(references, level))  # came later than the others
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{folder}: holds no evaluation that can be read ({what}); run vlm-lora eval") from error
        return cls(tuple(answered), scores, values)

    def ranks(self, who: str) -> list[tuple[float, ...]]:
        """What each answer is ranked by: CIDEr-D of captions; of short answers exact match, then the spelling."""
        names = ["cider_d"] if headline(self.scores)[0] == "cider_d" else ["exact_match", "anls"]
        return list(zip(*[self.values[who][name] for name in names], strict=True))

    def gains(self) -> list[tuple[float, ...]]:
        """How far each tuned answer ranks above the base's: zeros where they are equal."""
        both = zip(self.ranks("base"), self.ranks("tuned"), strict=True)
        return [tuple(t - b for b, t in zip(*pair, strict=True)) for pair in both]


def evaluate(
    captioner: Captioner,
    examples: Sequence[Example],
    *,
    blanked: bool = False,
    level: Literal["auto"] | metrics.Level = "auto",
    also: Sequence[Example] = (),
    decoding: Decoding | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answer every question of every example with base and tuned model, and score both.

    Dialogues of one example that ask the same are one question with several references (a COCO image's five captions).
    An example with an image that cannot be used is left out, and named in the scores.

    Args:
        blanked: also answer with the tuned model and a plain grey image in each image's place: what the answer owes to
            the picture is the difference.
        level: what the metrics compare, words or characters; ``auto`` is characters for Chinese and Japanese.
        also: examples of something else, a check of what tuning made the model forget: their scores are apart.
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
    failed: dict[int, str] = {}
    done = 0
    for name in passes:
        for group in _groups(questions, ROWS_AT_ONCE):
            asked = {}
            for i in group:
                try:
                    images = map(_blank, examples[i].images) if name == "blanked" else examples[i].images
                    asked[i] = (captioner.features.get(list(images)), [turns for turns, _, _ in questions[i]])
                except DataError as error:
                    failed[i] = str(error)
                done += len(questions[i])
            if asked:
                answers = captioner.generate(list(asked.values()), tuned=name != "base", decoding=decoding)
                for i, answer in zip(asked, answers, strict=True):
                    said[name][i] = answer
            progress(done, total)
    if len(failed) == len(examples):
        raise DataError(f"None of the {len(examples):,} held-out images can be used; the first: {failed[0]}.")
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
        if i not in failed
        for q, (turns, kind, references) in enumerate(questions[i])
    ]
    references = [row.references for row in answered]
    if level == "auto":
        level = metrics.level_for(text for texts in references for text in texts)
    values = {name: per_answer([row.said(name) for row in answered], references, level) for name in passes}
    scores = summarize(answered, values, level)
    if captioner.backbone.quantised:
        scores["base_in_four_bits"] = True
    scores["failed"] = [{"source": examples[i].source, "reason": failed[i]} for i in sorted(failed)]
    if also:
        scores["also"] = evaluate(captioner, also, level=level, decoding=decoding, progress=progress).scores
    return Evaluation(tuple(answered), scores, values)


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


def per_answer(
    candidates: Sequence[str], references: Sequence[Sequence[str]], level: metrics.Level = "word"
) -> dict[str, list[float]]:
    """Every metric that has a value for each answer."""
    return {
        "exact_match": [metrics.exact_match(c, r) for c, r in zip(candidates, references, strict=True)],
        "vqa_accuracy": [metrics.vqa_accuracy(c, r) for c, r in zip(candidates, references, strict=True)],
        "anls": [metrics.anls(c, r) for c, r in zip(candidates, references, strict=True)],
        "cider_d": metrics.cider_d(candidates, references, level=level),
        "rouge_l": metrics.rouge_l(candidates, references, level=level),
    }


def summarize(
    answered: Sequence[Answered], values: dict[str, dict[str, list[float]]], level: metrics.Level = "word"
) -> dict:
    """The ``scores`` of an `Evaluation` from each answer's values."""
    passes = list(values)
    references = [row.references for row in answered]
    groups = [row.example for row in answered]
    scores: dict = {"examples": len(set(groups)), "answers": len(answered), "tokens": metrics.TOKENIZER_ID[level]}
    scores["reference_words"] = _words_of_references(references, level)
    scores["intervals"] = {}
    counts: dict[str, list[metrics.BleuStats]] = {}
    for name in passes:
        candidates = [row.said(name) for row in answered]
        counts[name] = [metrics.bleu_stats(c, r, level=level) for c, r in zip(candidates, references, strict=True)]
        scores[name] = {metric: sum(v) / len(v) for metric, v in values[name].items()}
        scores[name] |= dict(zip(BLEU, metrics.bleu_from_stats(counts[name]), strict=True))
        scores[name]["mean_words"] = metrics.mean_length(candidates, level=level)
        scores[name]["distinct"] = metrics.distinct_share(candidates, level=level)
        repeated = [metrics.repetition(candidate, level=level) for candidate in candidates]
        scores[name]["repetition"] = sum(repeated) / len(repeated)
        scores["intervals"][name] = {
            metric: list(metrics.bootstrap_interval(v, groups=groups)) for metric, v in values[name].items()
        }
        intervals = metrics.bleu_intervals(counts[name], groups=groups)
        scores["intervals"][name] |= dict(zip(BLEU, map(list, intervals), strict=True))
    if "tuned" in passes:
        scores["gain"] = {
            metric: metrics.paired_bootstrap(values["base"][metric], values["tuned"][metric], groups=groups)._asdict()
            for metric in values["base"]
        }
        gains = metrics.paired_bleu(counts["base"], counts["tuned"], groups=groups)
        scores["gain"] |= {metric: gain._asdict() for metric, gain in zip(BLEU, gains, strict=True)}
    kinds = sorted({row.kind for row in answered if row.kind})
    scores["by_kind"] = {}
    for kind in kinds:
        of_kind = [i for i, row in enumerate(answered) if row.kind == kind]
        exact, vqa = (
            {name: sum(values[name][metric][i] for i in of_kind) / len(of_kind) for name in passes}
            for metric in ("exact_match", "vqa_accuracy")
        )
        scores["by_kind"][kind] = {"answers": len(of_kind), **exact, "vqa_accuracy": vqa}
    return scores


def _words_of_references(references: Sequence[Sequence[str]], level: metrics.Level) -> float:
    return metrics.mean_length([text for texts in references for text in texts], level=level)


def headline(scores: dict) -> list[str]:
    """The metrics worth a look: exact match and the like where the data's answers are short, CIDEr-D and company where
    they are captions. How much the models say is another matter."""
    captions = scores["reference_words"] > 4
    return ["cider_d", "bleu_4", "rouge_l"] if captions else ["exact_match", "vqa_accuracy", "anls"]


def table(scores: dict) -> str:
    """The scores as plain text: a line a metric, base and tuned with intervals, and the gain."""
    passes = [name for name in ("base", "tuned", "blanked") if name in scores]
    titles = {"base": "base", "tuned": "tuned", "blanked": "tuned, image blanked"}
    lines = [
        ["", *[titles[name] for name in passes], *(["gain (95 % interval), paired test"] if "gain" in scores else [])]
    ]
    for metric in headline(scores):
        line = [metric.replace("_", " ")]
        for name in passes:
            interval = scores["intervals"][name].get(metric)
            line.append(
                metric_text(metric, scores[name][metric]) + (f" ({span(metric, *interval)})" if interval else "")
            )
        if gain := scores.get("gain", {}).get(metric):
            told = metric_text(metric, gain["gain"], points=True, sign=True)
            sure = f", p {gain['p_value']:.3f}" if scores["examples"] >= FEW_IMAGES else ""
            line.append(f"{told} ({span(metric, gain['low'], gain['high'], sign=True)}){sure}")
        lines.append(line)
    for key, name, form in STATISTICS:
        lines.append([name, *[form.format(scores[who][key]) for who in passes]])
    for kind, row in scores["by_kind"].items():
        told = [
            f"{metric_text('exact_match', row[name])} ({metric_text('vqa_accuracy', row['vqa_accuracy'][name])})"
            for name in passes
        ]
        lines.append([f"exact match (VQA accuracy), {kind} ({row['answers']})", *told])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    rows = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)
    return "\n".join(rows).replace("\u00a0", " ")


def metric_text(metric: str, value: float, points: bool = False, sign: bool = False) -> str:
    """CIDEr-D as it is, the rest in percent; a difference of percents is in points."""
    if metric in WHOLE_SCALE:
        return f"{value:+.2f}" if sign else f"{value:.2f}"
    number = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return number + ("\u00a0points" if points else "\u00a0%")


def span(metric: str, low: float, high: float, sign: bool = False) -> str:
    scale, digits = (1, 2) if metric in WHOLE_SCALE else (100, 1)
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{scale * low:{form}} to {scale * high:{form}}"
