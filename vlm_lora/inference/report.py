"""The picture report: one HTML file that shows what a run gained, on which images, and where it lost.

Self-contained: styles, the loss curve and small copies of the pictures are inside, and it runs no script.
Captions, questions and names come from data and from models, so every one of them is escaped.
"""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup, escape
from PIL import Image, ImageDraw

from vlm_lora.console import size
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.images import load_image
from vlm_lora.errors import DataError
from vlm_lora.inference.evaluation import Evaluation
from vlm_lora.inference.filmstrip import read_filmstrip, steps_shown
from vlm_lora.inference.losses import Losses, read_losses, read_memory
from vlm_lora.inference.metrics.boxes import boxes_in, shares
from vlm_lora.inference.metrics.tokens import LONE, tokenize
from vlm_lora.inference.pages import render
from vlm_lora.inference.plots import line_plot
from vlm_lora.inference.scores import TASKS, Scores
from vlm_lora.inference.scoring import Answered
from vlm_lora.inference.tasks import BOXES, CAPTIONS, TEXTS
from vlm_lora.inference.verdict import (
    COLUMNS,
    LEGEND,
    columns_of,
    counts,
    headlines,
    part_tables,
    score_table,
    summary,
    versus,
)
from vlm_lora.version import __version__

PICTURES = 24
"""Cards in the gallery, but for those of what is still wrong."""
STILL_WRONG = 12
"""Cards, and mistakes in the table, of what is still wrong."""
THUMBNAIL, LARGE = 256, 1024
"""Longest side of a picture in the report, and of one that is shown alone, in pixels."""
BOXED = {"references": ("the data's", "green"), "base": ("base's", "orange"), "tuned": ("tuned's", "blue")}
"""Whose boxes are drawn into a picture, in this order, by their fields of `Answered`."""
CRISP = 128
"""Pictures up to this side are shown enlarged with their pixels sharp."""
TABLES = {"tasks": TASKS, "counts": counts, "score_table": score_table, "part_tables": part_tables, "legend": LEGEND}
TABLES |= {"columns": COLUMNS, "most_mistakes": STILL_WRONG}
"""What the templates draw tables of scores with."""


def write_report(
    folder: Path,
    evaluation: Evaluation,
    *,
    title: str,
    command: str | None = None,
    other: tuple[str, str, Scores] | None = None,
    watched: Sequence[Example] = (),
) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Args:
        folder: also where ``metrics.jsonl`` is looked for; without it the report has no loss curve and no filmstrip.
        command: what the run was started with, shown at the end.
        other: two adapters beside each other: the name of this one and of another, and the scores `against` that one.
        watched: examples that have the pictures of the filmstrip; those that were answered have them too.
    """
    scores = evaluation.scores
    asked = {row.question.strip() for row in evaluation.answered}
    pictures = {each.example: each.images for each in evaluation.answered} | {each.id: each.images for each in watched}
    page = render(
        "report.html",
        title=title,
        command=command,
        version=__version__,
        evaluation=evaluation,
        summary=summary,
        learning=show_learning(folder, {name: images[0] for name, images in pictures.items() if images}),
        question=asked.pop() if len(asked) == 1 else "",
        changes=str(evaluation.changes()) if scores.tuned else "",
        gallery=_gallery(evaluation),
        mistakes=evaluation.mistakes(),
        other=other[2] if other else None,
        versus=versus(other[2], *other[:2]) if other else [],
        titles=columns_of(*other[:2]) if other else COLUMNS,
        memory=read_memory(folder),
        size=size,
        uri_of=_uri,
        boxes=_colours(evaluation) if BOXES in scores.tasks else "",
        marked=_marked,
        **TABLES,
    )
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")  # a caption may hold half a surrogate pair
    return path


def show_learning(run: str | Path, pictures: Mapping[str, ImageRef]) -> Markup:
    """HTML of a run's loss curve, and of the captions that were watched while it trained (``--watch``).

    It can be called while the run is still training, and is empty as long as there is nothing to show.

    Args:
        run: the run folder.
        pictures: the watched images, by the id of their example.
    """
    films, (plot, loss) = read_filmstrip(Path(run)), _loss_plot(read_losses(run))
    if not (films or plot):
        return Markup()
    return render(
        "learning.html",
        plot=plot,
        loss=loss,
        films=[(film, _uri(pictures[film.example]) if film.example in pictures else None) for film in films],
        steps=steps_shown(films),
        question=len({film.question.strip() for film in films}) == 1,
        marked=_marked,
    )


def show_evaluation(evaluation: Evaluation) -> tuple[Markup, Markup]:
    """HTML of what a run was worth: its figures, to be read from afar, with the verdict; and below the answers what was
    taken for what, and all scores by kind."""
    head = render("verdict.html", headlines=headlines(evaluation.scores), summary=evaluation.verdict())
    return head, render("scores.html", evaluation=evaluation, mistakes=evaluation.mistakes(), **TABLES)


def show_answer(evaluation: Evaluation, place: int) -> Markup:
    """HTML of one of `Evaluation.answered`: its picture, large, and what each model and the data say, with words marked
    that the data does not say."""
    uri_of = partial(_uri, side=LARGE)
    return render("answer.html", evaluation=evaluation, place=place, uri_of=uri_of, marked=_marked)


# -- the loss curve ------------------------------------------------------------------------------------------


def _loss_plot(losses: Losses) -> tuple[Markup, str]:
    """The curve, and in words what it shows; nothing where there is none."""
    train, held_out, smooth = losses.training, losses.held_out, _smooth(losses.training)
    if len(train) < 2:
        return Markup(), ""
    # The axis shows the course of the loss; one wild step may leave the drawing at the top.
    values = sorted(loss for _, loss in train)
    usual = values[: max(2, math.ceil(0.98 * len(values)))]
    shown = [*usual, *(loss for _, loss in smooth + held_out)]
    text = f"Training loss from {smooth[0][1]:.3g} to {smooth[-1][1]:.3g} over {max(train + held_out)[0]:,} steps"
    if held_out:
        start = f"from {held_out[0][1]:.3g} to " if len(held_out) > 1 else ""
        text += f"; held-out loss {start}{held_out[-1][1]:.3g}"
    held_out_name = "held-out sample" if losses.sample else "held out"
    if losses.sample:
        text += f" ({losses.held_out_of})"
    if losses.of_all is not None:
        text += f", and {losses.of_all:.3g} on all of them by the final adapter"
    lines = {"each step": _thin(train, 600), "smoothed": _thin(smooth, 300)}
    if held_out:
        lines[held_out_name] = _thin(held_out, 60)
    plot = line_plot(lines, title=text, shown=(min(shown), max(shown)), names=("step", "loss"), dots={held_out_name})
    return plot, text


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


# -- the gallery ---------------------------------------------------------------------------------------------


def _gallery(evaluation: Evaluation) -> dict[str, list[int]]:
    """The answers that are shown, by heading."""
    rows = evaluation.answered
    if not evaluation.scores.tuned:
        base = evaluation.ranks("base")
        order = sorted(range(len(rows)), key=base.__getitem__, reverse=True)
        best = _spread(rows, order, PICTURES // 2)
        return {"Best answers": best, "Worst answers": _spread(rows, order[::-1], PICTURES // 2, best)}
    changes, wrong = evaluation.changes(), evaluation.still_wrong()
    # Losses get a third of the room where there are enough of them: they are what one learns from.
    gained = _spread(rows, changes.better, PICTURES - min(len(changes.worse), PICTURES // 3))
    lost = _spread(rows, changes.worse, PICTURES - len(gained), gained)
    wrong = _spread(rows, wrong, STILL_WRONG, gained + lost)
    same = _spread(rows, changes.same, min(6, PICTURES - len(gained) - len(lost)), gained + lost + wrong)
    return {"Gained most": gained, "Lost most": lost, "Still wrong": wrong, "Unchanged": same}


def _spread(rows: Sequence[Answered], order: Sequence[int], most: int, taken: Iterable[int] = ()) -> list[int]:
    """The first of ``order``, one answer of each example, none of an example already taken: those that say something
    else first. Where short answers leave room, they come again with other pictures; captions do not."""
    seen = {key for i in taken for key in (rows[i].example, _said(rows[i]))}
    chosen: list[int] = []
    for again in (False, True):
        for i in order:
            keys = {rows[i].example} if again else {rows[i].example, _said(rows[i])}
            if len(chosen) < most and not keys & seen and not (again and rows[i].task in (CAPTIONS, TEXTS)):
                chosen.append(i)
                seen |= {rows[i].example, _said(rows[i])}
    return chosen


def _said(row: Answered) -> tuple:
    """What makes a card another one: of captions the text alone, which comes again and again with other pictures."""
    said = row.tuned if row.tuned is not None else row.base
    return (said,) if row.task in (CAPTIONS, TEXTS) else (said, row.base, row.question, row.references)


def _uri(image: ImageRef, row: Answered | None = None, side: int = THUMBNAIL) -> str | None:
    """A copy of an image, up to ``side`` pixels long, in a data URI: a PNG if its pixels are to be seen; None if it can
    no longer be read.

    The boxes of the row are drawn into it, where the image is the only one that they can be of.
    """
    try:
        picture = load_image(image)
    except DataError:
        return None
    picture.thumbnail((side, side))
    if row and len(row.images) == len(row.frames) == 1:
        _draw_boxes(picture, row)
    kind = "png" if max(picture.size) <= CRISP else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _colours(evaluation: Evaluation) -> str:
    """Whose boxes have which colour, in words."""
    there = ("references", *evaluation.values)
    return ", ".join(f"{colour} {name}" for who, (name, colour) in BOXED.items() if who in there)


def _draw_boxes(picture: Image.Image, row: Answered) -> None:
    pen, large = ImageDraw.Draw(picture), max(picture.size) > CRISP
    for who, (_, colour) in BOXED.items():
        width = 1 + large * (3 if who == "references" else 1)  # a rim of the data's is seen around one that is right
        texts = row.references if who == "references" else (getattr(row, who) or "",)
        for box in (box for text in texts for box in boxes_in(text)):
            corners = [share * picture.size[i % 2] for i, share in enumerate(shares(box, row.frames[0]))]
            # What a model says may be upside down, or miles away
            x1, y1, x2, y2 = (min(max(round(v), 0), picture.size[i % 2] - 1) for i, v in enumerate(corners))
            if x1 <= x2 and y1 <= y2:
                pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)


_PIECE = re.compile(rf"\s+|[{LONE}]|[^\s{LONE}]+")  # kana and Han are compared one by one


def _tokens(text: str) -> set[str]:
    return {token for piece in _PIECE.findall(text) for token in tokenize(piece)}


def _marked(text: str, references: Iterable[str]) -> Markup:
    """The text with words marked that are in no reference."""
    known = _tokens(" \n ".join(references))
    shown = []
    for piece in _PIECE.findall(text):
        shown.append(escape(piece) if set(tokenize(piece)) <= known else Markup("<mark>{}</mark>").format(piece))
    return Markup(re.sub(r"</mark>(\s*)<mark>", r"\1", Markup().join(shown)))
