"""The documents: links and anchors, the Chinese README in step with the English one, figures as in the records,
messages as in the code. `make docs` builds the site; this needs no generator.

Run: pytest tests/test_docs.py
"""

import ast
import itertools
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from bench.speed_report import medians
from tests.conftest import ROOT
from vlm_lora.cli import VERBS, command_line

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ENGLISH, CHINESE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(path), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(read(path)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for link in links(path):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_the_site_has_every_page():
    index = read(ROOT / "docs/index.md")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL)
    named = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted([*named, "index"]) == [path.stem for path in DOCS]
    assert {f"{name}.md" for name in named} <= set(links(ROOT / "docs/index.md"))


def test_the_readme_is_short():
    assert len(without_code(read(ENGLISH)).split()) < 900


def test_the_readme_names_every_command():
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2].replace("evaluate", "eval")
        assert f"`{name}`" in read(ENGLISH), name


@pytest.mark.parametrize("path", [ENGLISH, *DOCS], ids=lambda path: path.stem)
def test_every_documented_command_is_one(path):
    """Its flags are there, and have values that may be."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", read(path), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        start = next((i for i, word in enumerate(words) if word in ("vlm-lora", "vlm_lora")), None)
        if start is None or words[0] in ("pip", "python3"):
            continue
        words = list(itertools.takewhile(lambda word: word not in ("|", ">", "&&"), words[start + 1 :]))
        options, unknown = command_line().parse_known_args(words)
        assert unknown == [], line
        assert options.verb, line


@pytest.mark.parametrize("path", [ENGLISH, *DOCS], ids=lambda path: path.stem)
def test_every_line_of_python_is_sound(path):
    for block in re.findall(r"```python\n(.*?)```", read(path), flags=re.DOTALL):
        assert compile(block, path.name, "exec")


# -- the Chinese README --------------------------------------------------------------------------------------


def skeleton(path: Path) -> dict[str, list]:
    """What both READMEs must have alike."""
    text = read(path)
    code = re.findall(r"```(sh|python)\n(.*?)```", text, flags=re.DOTALL)
    body = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    tables = [line for line in body.splitlines() if line.startswith("|")]
    return {
        "commands": [[line.split("#")[0].rstrip() for line in block.splitlines()] for _, block in code],
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", body, flags=re.MULTILINE)],
        "tables": [(line.count("|"), re.findall(r"\d[\d.,]*x?|`[^`]+`|-+:?(?=\|)", line)) for line in tables],
        "figures": sorted(re.findall(r"\d[\d.,]*\d ?%|\d[\d,]*\d(?= |\b)", body.replace("\u00a0", " "))),
        "links": sorted({link.partition("#")[0] for link in links(path)} - {ENGLISH.name, CHINESE.name}),
    }


@pytest.mark.parametrize("what", ["commands", "headings", "tables", "links"])
def test_the_chinese_readme_is_in_step(what):
    assert skeleton(CHINESE)[what] == skeleton(ENGLISH)[what]


# -- figures -------------------------------------------------------------------------------------------------


def test_the_readmes_table_is_that_of_the_record():
    record = json.loads(read(ROOT / "bench/results/speed.json"))
    rows = {"swift": {"epoch": [], "memory": []}, "plain": {"epoch": [], "memory": []}}
    for workload in ("1 caption", "5 captions", "10 questions"):
        (methods,) = (row for name, row in medians(record, "main").items() if name.startswith(workload))
        ours, cold = methods["vlm-lora"], methods["vlm-lora, cold"]
        for other, of in rows.items():
            of["epoch"].append(f"{methods[other]['epoch'] / ours['epoch']:.1f}x")
            of["memory"].append(f"{max(ours['peak'], cold['peak']) / methods[other]['peak']:.2f}x")
    lines = [line for line in read(ENGLISH).splitlines() if line.startswith(("| an epoch", "| peak"))]
    shown = [re.findall(r"[\d.]+x", line) for line in lines]
    assert shown == [of[what] for what in ("epoch", "memory") for of in (rows["swift"], rows["plain"])]


def test_what_the_readme_says_of_easy_vqa_is_in_the_record():
    record = json.dumps(json.loads(read(ROOT / "bench/results/easy_vqa.json")))
    for figure in re.findall(r"(\d\d\.\d) %", read(ENGLISH)):
        found = [float(n) for n in re.findall(r"0\.\d+|\d\d\.\d+", record)]
        assert any(f"{100 * n:.1f}" == figure or f"{n:.1f}" == figure for n in found), figure


# -- messages ------------------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str:
    """A string of the code, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    assert isinstance(node, ast.JoinedStr)
    return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def texts_of_the_code() -> str:
    nodes = (node for path in (ROOT / "vlm_lora").rglob("*.py") for node in ast.walk(ast.parse(read(path))))
    return "\n".join(text_of(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))


def test_the_messages_that_are_explained_are_those_of_the_code():
    said = texts_of_the_code()
    explained = re.findall(r"^- \*\*`(.+?)`\*\*", read(ROOT / "docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(explained) >= 40
    assert len(set(explained)) == len(explained)
    assert [message for message in explained if message not in said] == []


def test_the_picture_of_the_mask_is_of_the_mask_that_is_used():
    drawn = runpy.run_path(str(ROOT / "docs/pictures.py"))
    assert read(ROOT / "docs/mask.svg") == drawn["mask"]() + "\n"
    assert read(ROOT / "docs/forks.svg") == drawn["forks"]() + "\n"
