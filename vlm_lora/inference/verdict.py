"""What scores come to: the verdict in sentences, and tables.

Tuning has helped where the tuned model beats its base, and everything that needs no tuning or no picture, by more than
chance explains: the base that is asked for a short answer, and whatever the data says most.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Literal

from vlm_lora.inference.scores import FEW_IMAGES, METRICS, TASKS, Metric, Scores, TaskScores, TypeScores

COLUMNS = {
    "base": "Base",
    "one_word": "Base, asked for one word",
    "commonest": "Commonest answer",
    "tuned": "Tuned",
    "gain": "Gain",
    "blanked": "Picture greyed out",
}
"""Columns of the tables, in order."""

FIGURES = (
    ("Words per answer", "mean_words", "{:.1f}"),
    ("Answers that differ", "distinct", "{:.0%}"),
    ("Repeats itself", "repetition", "{:.1%}"),
)
"""What is shown of answers beside their scores: its name in tables, which of `STATISTICS`, and its form."""

LEGEND = "the 95 % interval, by resampling the images; p: how likely chance alone would make as much of a difference"
"""What the note in a cell of `score_table` is."""

MOST_QUOTED = 40
"""Characters of an answer in a sentence."""

MOST_FIELDS = 40
"""Of JSON, in a table."""

# --- sentences


def summary(scores: Scores) -> list[str]:
    """A verdict on each task of the answers, honest where there is no gain, and what else is to be known."""
    sentences = []
    for task, of in scores.tasks.items():
        told = list(_verdict(of))
        if len(scores.tasks) > 1:
            told[0] = f"{TASKS[task].title}: {told[0][0].lower()}{told[0][1:]}"
        sentences += told
    if scores.tuned and scores.base_in_four_bits:
        sentences.append("Base here is the base in four bits; whole, it may do better.")
    if scores.unmoved:
        how = {"blanked": "with the picture greyed out", "other": "with another picture in its place"}
        shares = [
            f"{100 * u.share:.0f}\u00a0% ({100 * u.low:.0f} to {100 * u.high:.0f}) {how[who]}"
            for who, u in scores.unmoved.items()
        ]
        sentences.append(f"Of the tuned model's answers, these stay the same: {'; '.join(shares)}.")
    return sentences


@dataclass(frozen=True, slots=True)
class Headline:
    """A task's first metric, to be read from afar: "77 %" against "0 %"; without an adapter the base's alone."""

    tuned: str
    base: str
    of: str
    verdict: Literal["", "good", "bad"]


def headlines(scores: Scores) -> list[Headline]:
    """One of each task. A gain has a verdict where chance does not explain it."""
    return [_headline(task, of) for task, of in scores.tasks.items()]


def _headline(task: str, of: TaskScores) -> Headline:
    key, metric = next(iter(of.metrics.items()))
    values = [of.scores[who][key] for who in ("tuned", "base") if who in of.scores]
    shown = [f"{100 * value:.0f}\u00a0%" if metric.in_percent else metric.text(value) for value in values]
    if len(set(shown)) == 1:  # so near that rounding hides the difference
        shown = list(map(metric.text, values))
    told = f"{metric.name}, {'tuned against base' if len(values) > 1 else 'the base alone'}: {counts(task, of)}"
    verdict = _gain_cell(of, key).verdict if key in of.gains.get("base", {}) else ""
    return Headline(shown[0], shown[1] if len(shown) > 1 else "", told, verdict)


def versus(scores: Scores, ours: str, theirs: str) -> list[str]:
    """Of each task, which of two adapters is better, if that can be told.

    Args:
        scores: `against` one of them: tuned is ours, and base is theirs.
    """
    sentences = []
    for task, of in scores.tasks.items():
        key, metric = next(iter(of.metrics.items()))
        gain, values = of.gains["base"][key], {who: metric.text(of.scores[who][key]) for who in ("base", "tuned")}
        where = f"on {of.examples:,} held-out {'image' if of.examples == 1 else 'images'}"
        had = f"{where}, {metric.name} {values['tuned']} against {values['base']}"
        difference = (
            f"difference {metric.text(gain.gain, points=True, sign=True)}; 95\u00a0% interval "
            f"{metric.span(gain.low, gain.high)}{metric.unit(points=True)}"
        )
        if of.examples < FEW_IMAGES:
            told = f"Too few images to tell {ours} from {theirs}: {had}"
        elif gain.low > 0 or gain.high < 0:
            told = f"{ours} is {'better' if gain.low > 0 else 'worse'} than {theirs}: {had} ({difference})"
        else:
            told = f"No difference between {ours} and {theirs} that chance could not explain: {had} ({difference})"
        sentences.append(f"{TASKS[task].title}: {told}." if len(scores.tasks) > 1 else f"{told}.")
    return sentences


def columns_of(ours: str, theirs: str) -> dict[str, str]:
    """`COLUMNS` of two adapters beside each other."""
    return COLUMNS | {"base": theirs, "tuned": ours, "gain": "Difference"}


def quoted(text: str) -> str:
    """An answer of the data in a sentence: short, on one line, without what steers a terminal."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return f'"{line if len(line) <= MOST_QUOTED else line[: MOST_QUOTED - 1] + "…"}"'


def _verdict(of: TaskScores) -> Iterator[str]:
    key, metric = next(iter(of.metrics.items()))
    images = of.examples
    where = f"on {images:,} held-out {'image' if images == 1 else 'images'}"
    scores = {who: values[key] for who, values in of.scores.items()}
    before = metric.text(scores["base"])
    gain = of.gains.get("base", {}).get(key)
    if "tuned" not in scores or gain is None:
        interval = of.intervals.get("base", {}).get(key)
        span = f" (95\u00a0% interval {metric.span(*interval)}{metric.unit()})" if interval else ""
        yield f"The base model alone, {where}: {metric.name} {before}{span}."
        yield from _without_looking(of, key, metric)
        return
    after = metric.text(scores["tuned"])
    size = metric.text(abs(gain.gain), points=True)
    interval = f"95\u00a0% interval {metric.span(gain.low, gain.high)}{metric.unit(points=True)}"
    rose = f"{where}, {metric.name} rose from {before} to {after}, a gain of {size} ({interval})"
    unbeaten = [who for who in ("commonest", "one_word") if who in of.gains and of.gains[who][key].low <= 0]
    if images < FEW_IMAGES:
        yield (
            f"Too few images to tell: {where}, {metric.name} went from {before} to {after}. "
            f"Hold out {FEW_IMAGES} or more to know whether that is a gain."
        )
    elif gain.high < 0:
        yield f"Tuning did harm: {where}, {metric.name} fell from {before} to {after}, a loss of {size} ({interval})."
    elif gain.low <= 0:
        yield (
            f"No gain that chance could not explain: {where}, {metric.name} went from {before} to {after} "
            f"(difference {metric.text(gain.gain, points=True, sign=True)}; {interval}, which includes zero)."
        )
    elif "commonest" in unbeaten:
        worse = of.gains["commonest"][key].high < 0
        yield f"{'Worse than' if worse else 'No better than'} guessing without a look at the picture: {rose}."
    elif unbeaten:
        yield f"What tuning taught is the form, as far as can be told: {rose}."
    else:
        yield f"Tuning helped: {rose}."
    yield from _without_looking(of, key, metric)
    words = {who: of.scores[who]["mean_words"] for who in ("base", "tuned")}
    if key == "exact_match" and gain.gain > 0 and words["base"] > 2 * words["tuned"]:
        yield (
            f"Part of it is form: the base model answers in {words['base']:.1f} words on average, the tuned "
            f"one in {words['tuned']:.1f}, and a right answer in a sentence is no exact match."
        )
    if "blanked" in scores:
        most = scores["tuned"] > 0 and scores["blanked"] > scores["tuned"] / 2
        yield (
            f"{'Most of this is guessed without the picture: with' if most else 'With'} every picture greyed out, the "
            f"tuned model's {metric.name} is {metric.text(scores['blanked'])}."
        )
    behind = [name for name, row in of.types.items() if "commonest" in row.gains and row.gains["commonest"].low <= 0]
    if behind and len(of.types) > 1:
        named = "; ".join(_type_behind(name, of.types[name], metric) for name in behind)
        yield f"No better than the commonest answer of their type are: {named}."


def _without_looking(of: TaskScores, key: str, metric: Metric) -> Iterator[str]:
    """What the baselines have, and how far tuned is from them."""

    def told(who: str) -> str:
        score, gain = metric.text(of.scores[who][key]), of.gains.get(who, {}).get(key)
        if gain is None:
            return score
        lead = metric.text(gain.gain, points=True, sign=True)
        return f"{score} (tuned {lead}, {metric.span(gain.low, gain.high, sign=True)})"

    if "commonest" in of.scores and of.guess is not None:
        yield f"The commonest answer of {of.guess_source}, as {quoted(of.guess)}, has {told('commonest')}."
    if "one_word" in of.scores:
        yield f"The base, asked for one word, has {told('one_word')}."


def _type_behind(name: str, row: TypeScores, metric: Metric) -> str:
    key = next(iter(row.scores["tuned"]))
    tuned, guessed = (metric.text(row.scores[who][key]) for who in ("tuned", "commonest"))
    return f"{quoted(name)} ({row.answers:,} answers), {tuned} against {guessed}"


# --- tables


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    note: str = ""
    verdict: Literal["", "good", "bad"] = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.note})" if self.note else self.value


@dataclass(frozen=True, slots=True)
class Table:
    """Titles of the columns, that of the names first; and rows of a name and cells, the minor ones apart."""

    titles: list[str]
    rows: list[list[Cell]]
    minor: list[list[Cell]]

    def to_text(self) -> str:
        """Aligned by spaces, for a console."""
        lines = [self.titles, *([str(cell) for cell in row] for row in self.rows + self.minor)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines).replace("\u00a0", " ")

    def to_html(self) -> str:
        """Without the minor rows."""
        head = "".join(f"<th>{escape(title)}</th>" for title in self.titles)
        rows = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in self.rows]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def to_markdown(self) -> str:
        """Without the minor rows."""
        lines = [self.titles, ["---"] * len(self.titles), *([str(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts(task: str, of: TaskScores) -> str:
    """How much was compared, in words."""
    return f"{of.examples:,} images, {of.answers:,} {TASKS[task].noun}"


def tables_as_text(scores: Scores, titles: Mapping[str, str] = COLUMNS) -> str:
    """For a console."""
    parts = []
    for task, of in scores.tasks.items():
        if len(scores.tasks) > 1:
            parts.append(f"{TASKS[task].title}: {counts(task, of)}")
        parts += [table.to_text() for table in (score_table(of, titles), *part_tables(of, titles))]
    return "\n\n".join([*parts, f"In brackets: {LEGEND}."])


def score_table(of: TaskScores, titles: Mapping[str, str] = COLUMNS) -> Table:
    """Base, what needs no tuning, tuned, the gain over base, and tuned with pictures greyed out; the notes are
    explained by `LEGEND`."""
    columns = [column for column in COLUMNS if column in of.scores or (column == "gain" and "base" in of.gains)]

    def cell(key: str, column: str) -> Cell:
        if column == "gain":
            return _gain_cell(of, key)
        interval, metric = of.intervals.get(column, {}).get(key), METRICS[key]
        note = metric.span(*interval) if interval else ""
        return Cell(metric.text(of.scores[column][key]), note)

    def figure(name: str, form: str, column: str) -> Cell:
        return Cell("" if column == "gain" else form.format(of.scores[column][name]))

    return Table(
        ["", *(titles[column] for column in columns)],
        [[Cell(metric.title), *(cell(key, column) for column in columns)] for key, metric in of.metrics.items()],
        [[Cell(title), *(figure(name, form, column) for column in columns)] for title, name, form in FIGURES],
    )


def _gain_cell(of: TaskScores, key: str) -> Cell:
    metric, gain = METRICS[key], of.gains["base"].get(key)
    if gain is None:  # BLEU of an earlier version's evaluation
        difference = of.scores["tuned"][key] - of.scores["base"][key]
        return Cell(metric.text(difference, points=True, sign=True))
    text, note = metric.text(gain.gain, points=True, sign=True), metric.span(gain.low, gain.high, sign=True)
    if of.examples < FEW_IMAGES:  # as the summary says, too few to tell: no colour, no p
        return Cell(text, note)
    up, down = ("bad", "good") if metric.lower_is_better else ("good", "bad")
    verdict: Literal["", "good", "bad"] = up if gain.low > 0 else down if gain.high < 0 else ""
    return Cell(text, f"{note}, p\u00a0{gain.p_value:.3f}", verdict)


def part_tables(of: TaskScores, titles: Mapping[str, str] = COLUMNS) -> list[Table]:
    """By type of question, and by field of JSON, where there are any: the first metric, and the second as the note.
    The note of a name is how many answers, or fields, there are of it."""
    first = next(iter(of.metrics.values())).title
    parts = (
        (f"{first} by type of question", of.types),
        (f"{first} by name", dict(list(of.fields.items())[:MOST_FIELDS])),
    )
    columns = {who: title for who, title in titles.items() if who in of.scores}
    return [_part_table(title, part, columns) for title, part in parts if part]


def _part_table(title: str, part: dict[str, TypeScores], columns: dict[str, str]) -> Table:
    rows = []
    for name, row in part.items():
        rows.append([Cell(name, f"{row.answers:,}")])
        for who in columns:
            (first, value), *more = row.scores[who].items()
            notes = [f"{METRICS[key].name} {METRICS[key].text(other)}" for key, other in more]
            rows[-1].append(Cell(METRICS[first].text(value), "; ".join(notes)))
    return Table([title, *columns.values()], rows, [])
