"""Faults are put in as meant, and it is told which of them the tests see."""

import json
import subprocess
from dataclasses import replace

import pytest

from bench.mutants import draw, known_mutants, mutants, mutated
from bench.mutations import KNOWN, ROOT, TESTS, drawn, killed_before, record, run, survivors


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a < b", {"(a >= b)", "(a <= b)"}),
        ("a not in b", {"(a in b)"}),
        ("c - (a * b)", {"(c + a * b)", "c - ((a + b))"}),
        ("'a' + b", set()),
        ("a and not b", {"(a or not b)", "a and (b)"}),
        ("a and True", {"(a or True)", "a and False"}),
        ("x = 1.5", {"x = 3.0"}),
        ("x: Annotated[int, 1] = 2", {"x: Annotated[int, 1] = 3"}),
        ("x = max(a)", {"x = min(a)"}),
        ("f(a, b, c=d)", {"f(a, c=d)", "f(a, b)", "pass"}),
        ("x = a[i:]", {"x = a[(i) + 1:]"}),
        ("x = a[:]", {"x = a[1:]"}),
        ("isinstance(a, B | C)", {"isinstance(a)", "pass"}),
        ("x = f'{a + 1}'", set()),
        ("if a:\n    b.c = d", {"if True:\n    b.c = d", "if False:\n    b.c = d", "if a:\n    pass"}),
        ("while a:\n    break", {"while False:\n    break", "while a:\n    pass"}),
        ("raise Bad(1 + 2)", {"pass"}),
        (
            'def f() -> None | int:\n    """1 + 1"""\n    return a',
            {'def f() -> None | int:\n    """1 + 1"""\n    return None'},
        ),
        ("é = 'é', not b", {"é = 'é', (b)"}),
    ],
)
def test_a_mutant_is_the_source_with_one_thing_changed(source, wanted):
    made = {mutated(source, mutant) for mutant in mutants(source)}
    assert made == wanted


def test_the_same_seed_draws_the_same_and_every_kind():
    everything = mutants((ROOT / "bench/mutants.py").read_text(encoding="utf-8"))
    drawn = draw(everything, 60, "0")
    assert drawn == draw(everything, 60, "0") != draw(everything, 60, "1")
    assert len(set(drawn)) == 60
    assert {mutant.operator for mutant in drawn} == {mutant.operator for mutant in everything}


def test_what_the_tables_name_is_there():
    entries = json.loads(KNOWN.read_text())
    for module, tests in [*TESTS.items(), *((entry["file"], entry["tests"]) for entry in entries)]:
        assert all((ROOT / name.partition("::")[0]).is_file() for name in (module, *tests))
    for mutant, entry in zip(known_mutants(entries, ROOT), entries, strict=True):
        source = (ROOT / mutant.file).read_text()
        assert mutated(source, mutant) == source.replace(entry["before"], entry["after"]) != source


def test_what_a_test_sees_is_killed_and_what_none_sees_survives(tmp_path):
    source = "def more(x):\n    y = x + 1\n    return y\n\n\ndef unseen(a):\n    return a\n\n\n"
    source += "def wait():\n    while True:\n        break\n"
    (tmp_path / "own.py").write_text(source)
    test = "from own import more, wait\n\n\ndef test_more():\n    assert more(1) == 2\n    wait()\n"
    (tmp_path / "test_own.py").write_text(test)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    known = [{"file": "own.py", "before": "x + 1", "after": "x - 2", "what": "less", "tests": ["test_own.py"]}]
    table = {"own.py": ("test_own.py",)}
    results = run(tmp_path, drawn(tmp_path, table, count=100, seed=0, known=known), tell=str, grace=2)
    assert results[0].operator == "less"
    assert (tmp_path / "own.py").read_text() == source
    fates = {(mutant.line, mutant.after): mutant.killed_by for mutant in results}
    assert fates[2, "x - 2"] == fates[2, "y = (x - 1)"] == fates[3, "return None"] == "test_own.py::test_more"
    assert fates[7, "return None"] is None
    assert fates[12, "pass"] == "time limit"

    said: list[str] = []
    before = killed_before(drawn(tmp_path, table, count=0, seed=0, known=known), record(results, [])["mutants"])
    assert [mutant.killed_by for mutant, _ in before] == ["test_own.py::test_more"]
    renamed = [(replace(before[0][0], killed_by="test_own.py::test_of_another_name"), before[0][1])]
    for asked in (before, renamed):
        assert run(tmp_path, asked, tell=said.append, grace=20)[0].killed_by == "test_own.py::test_more"

    reason = {"file": "own.py", "line": "return a", "operator": "return value", "reason": "nobody asks"}
    before, after = record(results, []), record(results, [reason])
    assert before["total"]["survived"] == after["total"]["survived"] + 1
    assert before["total"]["drawn"] == len(results) == after["total"]["drawn"] + 1
    again = [mutant for mutant, _ in survivors(tmp_path, table, before["mutants"], known)]
    assert again == [replace(mutant, seconds=0.0) for mutant in results if mutant.killed_by is None]
    assert len(survivors(tmp_path, table, after["mutants"], known)) == len(again) - 1
    (tmp_path / "own.py").write_text("\n" + source.replace("return a", "return (a)"))
    moved = [mutant for mutant, _ in survivors(tmp_path, table, before["mutants"], known)]
    assert [mutant.line for mutant in moved] == [m.line + 1 for m in again if m.before != "return a"]
