"""The picture report: one HTML file that shows what a run gained, on which images, and where it lost.

Self-contained: styles, the loss curve and small copies of the pictures are inside, and it runs no script.
Captions, questions and names come from data and from models, so every one of them is escaped.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from vlm_lora import __version__
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import load_image
from vlm_lora.data.sheet import HEAD
from vlm_lora.errors import DataError
from vlm_lora.inference import metrics
from vlm_lora.inference.evaluate import (
    FEW_IMAGES,
    STATISTICS,
    WHOLE_SCALE,
    Answered,
    Evaluation,
    headline,
    metric_text,
    span,
)

PICTURES = 24
"""Cards in the gallery."""
THUMBNAIL = 256
"""Longest side of a picture in the report, in pixels."""
CRISP = 128
"""Pictures up to this side are shown enlarged with their pixels sharp."""
NAMES = {
    "exact_match": "Exact match",
    "vqa_accuracy": "VQA accuracy",
    "anls": "ANLS",
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}
MEANINGS = {
    "exact_match": "the share of answers that equal a reference, but for case and a full stop at the end",
    "vqa_accuracy": "agreement with the human answers: full marks where three or more of them say the same",
    "anls": "how near the spelling comes to a reference, from 0 to 100 %",
    "cider_d": "how much a caption says that the references say too, rare words counting most, from 0 to 10",
    "bleu_4": "the share of runs of up to four words that occur in a reference",
    "rouge_l": "how much of a reference comes in the same order in the caption",
}
WHO = {"base": "Base", "tuned": "Tuned", "gain": "Gain", "blanked": "Picture greyed out"}
"""Columns of the tables, in order."""


def write_report(folder: Path, evaluation: Evaluation, *, title: str, command: str | None = None) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Args:
        folder: also where ``metrics.jsonl`` is looked for; without it the report has no loss curve.
        command: what the run was started with, shown at the end.
    """
    scores = evaluation.scores
    sections = [
        f"<h1>{escape(title)}</h1>",
        "".join(f"<p class=lead>{escape(sentence)}</p>" for sentence in summary(scores)),
        "<h2>Scores</h2>" + _score_table(scores) + _kind_table(scores),
        _loss_section(folder / "metrics.jsonl"),
        _forgetting(scores),
        _gallery(evaluation),
        f"<h2>Command</h2><pre>{escape(command)}</pre>" if command else "",
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, sections))
    page = PAGE.format(title=escape(title), style=style, body=body, version=__version__)
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")  # a caption may hold half a surrogate pair
    return path


# -- what was gained -----------------------------------------------------------------------------------------


def summary(scores: dict) -> list[str]:
    """One sentence on the gain, honest where there is none; others on what there is to know about it."""
    metric = headline(scores)[0]
    name = "exact match" if metric == "exact_match" else NAMES[metric]
    images = scores["examples"]
    where = f"on {images:,} held-out {'image' if images == 1 else 'images'}"
    base = metric_text(metric, scores["base"][metric])
    if "tuned" not in scores:
        low, high = scores["intervals"]["base"][metric]
        return [f"The base model alone, {where}: {name} {base} ({_range(metric, low, high)})."]
    tuned, gain = metric_text(metric, scores["tuned"][metric]), scores["gain"][metric]
    size = metric_text(metric, abs(gain["gain"]), points=True)
    interval = _range(metric, gain["low"], gain["high"], points=True)
    if images < FEW_IMAGES:
        told = (
            f"Too few images to tell: {where}, {name} went from {base} to {tuned}. "
            f"Hold out {FEW_IMAGES} or more to know whether that is a gain."
        )
    elif gain["low"] > 0:
        told = f"Tuning helped: {where}, {name} rose from {base} to {tuned}, a gain of {size} ({interval})."
    elif gain["high"] < 0:
        told = f"Tuning did harm: {where}, {name} fell from {base} to {tuned}, a loss of {size} ({interval})."
    else:
        difference = metric_text(metric, gain["gain"], points=True, sign=True)
        told = (
            f"No gain that chance could not explain: {where}, {name} went from {base} to {tuned} "
            f"(difference {difference}; {interval}, which includes zero)."
        )
    sentences = [told]
    words = {who: scores[who]["mean_words"] for who in ("base", "tuned")}
    if metric == "exact_match" and gain["gain"] > 0 and words["base"] > 2 * words["tuned"]:
        sentences.append(
            f"Part of it is form: the base model answers in {words['base']:.1f} words on average, the tuned "
            f"one in {words['tuned']:.1f}, and a right answer in a sentence is no exact match."
        )
    if "base_in_four_bits" in scores:
        sentences.append("Base here is the base in four bits, as QLoRA was trained on it; whole, it may do better.")
    if "blanked" in scores:
        without = metric_text(metric, scores["blanked"][metric])
        sentences.append(f"With every picture greyed out, the tuned model's {name} is {without}.")
    return sentences


def _score_table(scores: dict) -> str:
    columns = [name for name in WHO if name in scores]
    rows = []
    for metric in headline(scores):
        cells = []
        for column in columns:
            if column == "gain":
                cells.append(_gain_cell(metric, scores))
            else:
                interval = scores["intervals"][column].get(metric)
                around = span(metric, *interval) if interval else ""
                cells.append(_cell(metric_text(metric, scores[column][metric]), around))
        rows.append(f"<tr><th scope=row>{NAMES[metric]}</th>{''.join(cells)}</tr>")
    for key, name, form in STATISTICS:
        cells = [_cell("" if column == "gain" else form.format(scores[column][key])) for column in columns]
        rows.append(f"<tr class=minor><th scope=row>{name.capitalize()}</th>{''.join(cells)}</tr>")
    meanings = "".join(f"<li><b>{NAMES[key]}</b>: {MEANINGS[key]}.</li>" for key in headline(scores))
    return (
        f"<div class=wide><table>{_heads(columns)}<tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=note>{scores['examples']:,} images, {scores['answers']:,} questions. "
        "Small figures: the 95 % interval, by resampling the images; p: how likely chance alone would make as much "
        f"of a difference. Compared as {escape(scores['tokens'])} tokens.</p>"
        f"<details><summary>What the numbers mean</summary><ul>{meanings}</ul></details>"
    )


def _gain_cell(metric: str, scores: dict) -> str:
    gain = scores["gain"].get(metric)
    if gain is None:  # BLEU of an earlier version's evaluation
        difference = scores["tuned"][metric] - scores["base"][metric]
        return _cell(metric_text(metric, difference, points=True, sign=True))
    shown = metric_text(metric, gain["gain"], points=True, sign=True)
    around = span(metric, gain["low"], gain["high"], sign=True)
    if scores["examples"] < FEW_IMAGES:  # as the lead says, too few to tell: no colour, no p
        return _cell(shown, around)
    kind = "good" if gain["low"] > 0 else "bad" if gain["high"] < 0 else ""
    return _cell(shown, f"{around}, p\u00a0{gain['p_value']:.3f}", kind)


def _forgetting(scores: dict) -> str:
    if "also" not in scores:
        return ""
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(scores["also"]))
    return f"<h2>On other data, to see what was forgotten</h2>{told}{_score_table(scores['also'])}"


def _kind_table(scores: dict) -> str:
    passes = [name for name in WHO if name in scores and name != "gain"]
    if not scores.get("by_kind"):
        return ""
    rows = "".join(
        f"<tr><th scope=row><bdi>{escape(kind)}</bdi> <small>{row['answers']:,}</small></th>"
        + "".join(
            _cell(
                metric_text("exact_match", row[who]),
                f"VQA accuracy {metric_text('vqa_accuracy', row['vqa_accuracy'][who])}",
            )
            for who in passes
        )
        + "</tr>"
        for kind, row in scores["by_kind"].items()
    )
    few = " open" if len(scores["by_kind"]) <= 12 else ""
    return (
        f"<details{few}><summary>Exact match by kind of question</summary>"
        f"<div class=wide><table>{_heads(passes)}<tbody>{rows}</tbody></table></div></details>"
    )


def _heads(columns: Iterable[str]) -> str:
    heads = "".join(f"<th scope=col>{WHO[column]}</th>" for column in columns)
    return f"<thead><tr><td></td>{heads}</tr></thead>"


def _cell(value: str, interval: str = "", kind: str = "") -> str:
    small = f"<small>{interval}</small>" if interval else ""
    return f"<td{f' class={kind}' if kind else ''}>{value}{small}</td>"


def _range(metric: str, low: float, high: float, points: bool = False) -> str:
    unit = "" if metric in WHOLE_SCALE else "\u00a0points" if points else "\u00a0%"
    return f"95\u00a0% interval {span(metric, low, high)}{unit}"


# -- the loss curve ------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 640, 280, 48, 32, 36  # of the drawing, and its margins for the numbers


def _loss_section(path: Path) -> str:
    train, held_out = _losses(path)
    if len(train) < 2:
        return ""
    smooth = _smooth(train)
    # The axis shows the course of the loss; one wild step may leave the drawing at the top.
    values = sorted(loss for _, loss in train)
    usual = values[: max(2, math.ceil(0.98 * len(values)))]
    shown = [*usual, *(loss for _, loss in smooth + held_out)]
    ticks = _ticks(min(shown), max(shown))
    low, high = ticks[0], ticks[-1]
    first, last = train[0][0], max(train[-1][0], held_out[-1][0] if held_out else 0)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(loss: float) -> float:
        return round(HEIGHT - BOTTOM - (loss - low) / (high - low) * (HEIGHT - BOTTOM - 12), 1)

    def line(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{x(step)},{y(loss)}" for step, loss in points)

    grid = "".join(
        f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y(tick)} y2={y(tick)} />"
        f"<text x={LEFT - 8} y={y(tick) + 4} text-anchor=end>{tick:g}</text>"
        for tick in ticks
    )
    steps = [tick for tick in _ticks(first, last) if first <= tick <= last and tick == int(tick)]
    below = HEIGHT - BOTTOM + 20
    grid += "".join(f"<text x={x(t)} y={below} text-anchor=middle>{t:,.0f}</text>" for t in steps)
    dots = "".join(f"<circle cx={x(step)} cy={y(loss)} r=4 />" for step, loss in _thin(held_out, 60))
    told = f"Training loss from {smooth[0][1]:.3g} to {smooth[-1][1]:.3g} over {last:,} steps"
    if held_out:
        start = f"from {held_out[0][1]:.3g} to " if len(held_out) > 1 else ""
        told += f"; held-out loss {start}{held_out[-1][1]:.3g}"
    legend = "<span class=raw>each step</span><span class=smooth>training, smoothed</span>"
    legend += "<span class=held>held out</span>" if held_out else ""
    return (
        f'<h2>Loss</h2><figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img><title>{told}</title>'
        f"<clipPath id=plot><rect x={LEFT} width={WIDTH - LEFT} height={HEIGHT - BOTTOM + 2} /></clipPath>"
        f'{grid}<g clip-path="url(#plot)"><polyline class=raw points="{line(_thin(train, 600))}" />'
        f'<polyline class=smooth points="{line(_thin(smooth, 300))}" />'
        f'<polyline class=held points="{line(held_out)}" /><g class=held>{dots}</g></g></svg>'
        f"<figcaption>{legend}<br>{told}.</figcaption></figure>"
    )


def _losses(path: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and of held-out data. A line that was cut off is passed over."""
    train, held_out = [], []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                for name, points in (("loss", train), ("held_out_loss", held_out)):
                    if math.isfinite(row.get(name, math.nan)):
                        points.append((int(row["step"]), float(row[name])))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return sorted(train), sorted(held_out)


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean that forgets over a fortieth of the run; unbiased from its first point on."""
    keep = 1 - 1 / max(3, len(points) / 40)
    total = weight = 0.0
    smooth = []
    for step, loss in points:
        total, weight = keep * total + loss, keep * weight + 1
        smooth.append((step, total / weight))
    return smooth


def _thin(points: Sequence[tuple[int, float]], most: int) -> Sequence[tuple[int, float]]:
    """At most ``most`` of the points, evenly, with the last one."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around low..high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(start, max(end, start + 1) + 1)]


# -- the gallery ---------------------------------------------------------------------------------------------


def _gallery(evaluation: Evaluation) -> str:
    rows = evaluation.answered
    asked = {row.question.strip() for row in rows}
    # What is asked of every picture is said once, and by no card.
    once = f"<p dir=auto>Asked of each: <b>{escape(*asked)}</b></p>" if len(asked) == 1 and all(asked) else ""

    def cards(title: str, chosen: Sequence[int]) -> str:
        if not chosen:
            return ""
        made = "".join(_card(evaluation, i, question=not once) for i in chosen)
        return f"<h3>{title}</h3><div class=cards>{made}</div>"

    if "tuned" not in evaluation.scores:
        base = evaluation.ranks("base")
        order = sorted(range(len(rows)), key=base.__getitem__, reverse=True)
        chosen = _spread(rows, order, PICTURES // 2)
        worst = _spread(rows, order[::-1], PICTURES // 2, chosen)
        return f"<h2>Pictures</h2>{once}" + cards("Best answers", chosen) + cards("Worst answers", worst)
    gain = evaluation.gains()
    nothing = (0.0,) * len(gain[0])
    order = sorted(range(len(rows)), key=gain.__getitem__, reverse=True)
    better = [i for i in order if gain[i] > nothing]
    worse = [i for i in reversed(order) if gain[i] < nothing]
    # Losses get a third of the room where there are enough of them: they are what one learns from.
    gains = _spread(rows, better, PICTURES - min(len(worse), PICTURES // 3))
    losses = _spread(rows, worse, PICTURES - len(gains), gains)
    equal = [i for i in order if gain[i] == nothing]
    room = min(6, PICTURES - len(gains) - len(losses))
    same = _spread(rows, equal, room, gains + losses)
    return (
        f"<h2>Pictures</h2>{once}"
        f"<p>Of {len(rows):,} answers, tuning made {len(better):,} better and {len(worse):,} worse; "
        f"{len(equal):,} score the same. <mark>Marked</mark> words occur in none of the references.</p>"
        + cards("Gained most", gains)
        + cards("Lost most", losses)
        + cards("Unchanged", same)
    )


def _spread(rows: Sequence[Answered], order: list[int], most: int, taken: Sequence[int] = ()) -> list[int]:
    """The first of ``order``, one answer of each example, none of an example already taken."""
    chosen: list[int] = []
    seen = {rows[i].example for i in taken}
    for i in order:
        if len(chosen) >= most:
            break
        if rows[i].example not in seen:
            seen.add(rows[i].example)
            chosen.append(i)
    return chosen


def _card(evaluation: Evaluation, index: int, question: bool) -> str:
    row = evaluation.answered[index]
    pictures = "".join(_picture(image) for image in row.images[:4])
    references = list(dict.fromkeys(row.references))[:5]
    known = _tokens(" \n ".join(row.references))
    captions = headline(evaluation.scores)[0] == "cider_d"
    lines = []
    for who, name in (("tuned", "Tuned"), ("base", "Base"), ("blanked", "Greyed out")):
        text = row.said(who)
        if text is not None:
            # Whether a short answer is right, the reader sees.
            score = f" <small>CIDEr-D {evaluation.values[who]['cider_d'][index]:.2f}</small>" if captions else ""
            lines.append((name + score, _marked(text, known) if text.strip() else "<i>nothing</i>"))
    lines.append(("Reference" if len(references) == 1 else "References", "<br>".join(map(escape, references))))
    told = "".join(f"<div><dt>{name}</dt><dd dir=auto>{text}</dd></div>" for name, text in lines)
    asked = f"<p class=question dir=auto>{escape(row.question)}</p>" if question and row.question.strip() else ""
    return f"<article><div class=pictures>{pictures}</div>{asked}<dl>{told}</dl></article>"


def _picture(image: ImageRef) -> str:
    try:
        picture = load_image(image)
    except DataError:
        return f"<p class=gone>The picture {escape(image.name)} can no longer be read.</p>"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    crisp = max(picture.size) <= CRISP
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if crisp else "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{" class=crisp" if crisp else ""} alt="{escape(image.name)}" title="{escape(image.name)}" '
        f'src="data:image/{"png" if crisp else "jpeg"};base64,{data}">'
    )


_PIECE = re.compile(rf"\s+|[{metrics.LONE}]|[^\s{metrics.LONE}]+")  # kana and Han are compared one by one


def _tokens(text: str) -> set[str]:
    return {token for piece in _PIECE.findall(text) for token in metrics.tokenize(piece)}


def _marked(text: str, known: set[str]) -> str:
    """The text, escaped, with words that are in no reference marked."""
    shown = []
    for piece in _PIECE.findall(text):
        new = not set(metrics.tokenize(piece)) <= known
        shown.append(f"<mark>{escape(piece)}</mark>" if new else escape(piece))
    return re.sub(r"</mark>(\s*)<mark>", r"\1", "".join(shown))


# -- the page ------------------------------------------------------------------------------------------------

PAGE = (
    HEAD
    + """<body>
<main>
{body}
</main>
<footer>Written by vlm-lora {version}. One file, nothing is fetched: it can be sent or kept as it is.</footer>
</body>
</html>
"""
)
