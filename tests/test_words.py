"""Plain English: habits that may not come back into documents, help and messages, and sentences that stay short.

Run: pytest tests/test_words.py
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

HABITS = {
    r"\bgone on with\b": "resumed, continued",
    r"\bgo(es)? on (with|from) (it|the|an?|that)\b": "resume, continue, start from",
    r"\bbehind (?!a proxy)": "after",
    r"\bso many\b": "N, that many",
    r"\bby looking\b": "detected, recognised",
    r"\bwhich they are\b": "which",
    r"\bgive or take\b": "about",
    r"\bsay the same again\b": "run the same command again",
    r"\bcaptions? (them )?anew\b": "caption again",
    r"\bof its own, instead\b": "of your own, instead",
    r"\bno such thing\b": "no meaning",
    r"\bas it is served\b": "as served",
    r"\bluck is larger\b": "results vary more",
    r"\bstands on white\b": "is padded with white",
    r"\b(nothing|none)( here)? tak(es|en) up\b": "is not used",
    r"\bgo(es)? on all the same\b": "continue anyway",
    r"\b(begin|starts?|started|computes? \w+|found) anew\b": "again, each time",
    r"\bhanded in again\b": "submitted again",
    r"\bfor the letters they are\b": "as plain letters",
    r"\bpass(es|ed)? (it|them|over) over\b|\bare passed over as if\b": "skip, ignore, read without",
}
"""What was said, and how to say it."""
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = 30
"""Words of a long sentence."""


def prose(text: str) -> str:
    return re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)


def user_visible() -> Iterator[tuple[str, str]]:
    """Texts of the code that may be printed: all but docstrings, and the docstrings that are help texts."""
    for path in (ROOT / "vlm_lora").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        if path.parent.name == "cli":
            yield path.name, ast.get_docstring(tree) or ""
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                yield f"{path.name}:{node.lineno}", node.value


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_does_not_come_back(habit):
    texts = [(path.name, prose(path.read_text(encoding="utf-8"))) for path in DOCUMENTS]
    found = [
        f"{place}: {match[0]!r}"
        for place, text in (*texts, *user_visible())
        for match in re.finditer(habit, text, re.I)
    ]
    assert found == [], f"say: {HABITS[habit]}"


def sentences(text: str) -> list[str]:
    """Of paragraphs and lists; tables, headings and code are left out."""
    blocks: list[list[str]] = [[]]
    for line in prose(text).splitlines():
        if not line.strip() or re.match(r"\s*([-*]|\d+\.) ", line):
            blocks.append([])
        if not line.startswith(("|", "#", "![")):
            blocks[-1].append(re.sub(r"^\s*([-*]|\d+\.) ", "", line.strip()))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", " ".join(block))) for block in blocks]
    cut = [part for block in plain for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z\"(c*])", block)]
    return [sentence for sentence in cut if len(sentence.split()) >= 3]


def long_share(paths) -> float:
    lengths = [len(s.split()) for path in paths for s in sentences(path.read_text(encoding="utf-8"))]
    return sum(length > LONG for length in lengths) / len(lengths)


def test_sentences_stay_short():
    assert long_share([ROOT / "README.md"]) < 0.03
    assert long_share(DOCUMENTS) < 0.01


def test_the_measure_sees_a_long_sentence(tmp_path):
    """Negative control."""
    (tmp_path / "x.md").write_text("# Title\n\nShort one here. " + "Word " * 40 + "end.\n\n| " + "cell " * 50 + "|\n")
    assert long_share([tmp_path / "x.md"]) == 0.5
