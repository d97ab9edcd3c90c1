"""How many faults the tests see: small changes of the code, one at a time, each against the tests that should fail.

    python -m bench.mutations --count 70 --seed 0
    python -m bench.mutations --modules packing split --count 20
    python -m bench.mutations --again bench/results/mutations.json --output bench/results/mutations-again.json
    python -m bench.mutations --count 200 --before bench/results/mutations.json

bench/mutants.py says which changes there are; those of bench/known_mutants.json, that no test saw once, come first.
Of each module as many are drawn as of any other, each kind as often as
any other. A change is made in a copy of the tree, never in the tree itself. It is
killed if a test fails or the time runs out (four times what the unchanged code takes, and 30 seconds). Before that,
the same tests have to pass on the unchanged code. A process that has loaded the libraries is forked for each, so that
a change costs what its tests cost. Some changes are none: bench/equivalent_mutants.json lists them with a reason, by
file, text of the line and operator; they are drawn and not counted.

The record goes to bench/results/mutations.json.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue

from bench.mutants import Mutant, draw, known_mutants, mutants, mutated

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT, KNOWN = ROOT / "bench/equivalent_mutants.json", ROOT / "bench/known_mutants.json"

MODEL, TRAINING, DATA = "tests/model", "tests/training", "tests/data"
LAYOUTS = f"{DATA}/test_layouts.py"
READERS = tuple(f"{DATA}/test_{name}.py" for name in ("fields", "formats", "layouts", "faults", "fault_table"))
# Which tests (files, or single ones) should see a fault of which module, the cheapest first:
TESTS: dict[str, tuple[str, ...]] = {
    "vlm_lora/inference/metrics/answers.py": ("tests/test_metrics.py",),
    "vlm_lora/inference/metrics/captions.py": ("tests/test_metrics.py",),
    "vlm_lora/inference/metrics/intervals.py": ("tests/test_metrics.py",),
    "vlm_lora/inference/metrics/tokens.py": ("tests/test_metrics.py",),
    "vlm_lora/data/split.py": (f"{DATA}/test_split.py",),
    "vlm_lora/data/archives.py": (LAYOUTS,),
    "vlm_lora/data/locate.py": READERS,
    "vlm_lora/inference/sinks.py": ("tests/inference/test_sinks.py", "tests/test_caption_command.py"),
    "vlm_lora/data/readers/folders.py": READERS,
    "vlm_lora/data/readers/labelstudio.py": (LAYOUTS,),
    "vlm_lora/data/readers/rows.py": READERS,
    "vlm_lora/data/readers/boxes.py": (f"{DATA}/test_boxes.py",),
    "vlm_lora/model/boxes.py": (f"{MODEL}/test_boxes.py",),
    "vlm_lora/inference/metrics/boxes.py": ("tests/inference/test_boxes.py",),
    "vlm_lora/data/readers/gather.py": READERS,
    "vlm_lora/data/readers/tables.py": READERS,
    "vlm_lora/data/readers/detect.py": READERS,
    "vlm_lora/data/readers/sources.py": (f"{DATA}/test_sources.py", *READERS),
    "vlm_lora/training/checkpoint.py": (
        f"{TRAINING}/test_checkpoint.py",
        f"{TRAINING}/test_float16.py",
        f"{TRAINING}/test_survival.py",
    ),
    "vlm_lora/model/features.py": (f"{MODEL}/test_features.py",),
    "vlm_lora/model/encode.py": (
        f"{MODEL}/test_encode.py",
        f"{MODEL}/test_boxes.py",
        f"{MODEL}/test_exactness.py",
    ),
    "vlm_lora/model/packing.py": (f"{MODEL}/test_encode.py", f"{MODEL}/test_exactness.py"),
    "vlm_lora/training/schedule.py": (f"{TRAINING}/test_schedule.py",),
    "vlm_lora/training/batches.py": (
        f"{TRAINING}/test_batches.py",
        f"{TRAINING}/test_processes.py::test_rows_are_dealt_out_evenly_and_each_once",
        f"{MODEL}/test_exactness.py",
        f"{TRAINING}/test_train.py",
    ),
    "vlm_lora/training/step.py": (
        f"{TRAINING}/test_step.py",
        f"{MODEL}/test_qlora.py",
        f"{TRAINING}/test_float16.py",
        f"{MODEL}/test_exactness.py",
        f"{TRAINING}/test_survival.py",
    ),
    "vlm_lora/training/prepare.py": (
        f"{TRAINING}/test_schedule.py",
        f"{DATA}/test_sources.py",
        f"{DATA}/test_fields.py",
        f"{TRAINING}/test_train.py",
        f"{DATA}/test_fuzz.py",
        f"{TRAINING}/test_processes.py::test_a_sample_of_the_held_out_images_is_the_same_on_several_and_one_looks_at_the_cache",
    ),
    "vlm_lora/training/loop.py": (
        f"{TRAINING}/test_train.py",
        f"{TRAINING}/test_survival.py",
        f"{TRAINING}/test_processes.py::test_stopped_and_gone_on_with_by_another_number_of_processes",
    ),
}
LOADED_ONCE = ("torch", "torchvision", "transformers", "transformers.models.qwen2_vl.modeling_qwen2_vl", "peft")
LOADED_ONCE += ("datasets", "hypothesis", "pytest")


class _FirstFailure:
    """A plugin of pytest that keeps the name of the first test, or file, that failed."""

    name: str | None = None

    def pytest_runtest_logreport(self, report) -> None:
        self.name = self.name or (report.nodeid if report.failed else None)

    pytest_collectreport = pytest_runtest_logreport


def _test_here(tree: Path, root: Path, tests: Sequence[str]) -> None:
    """In a fork: run the tests in the tree; what failed first goes to ``outcome`` beside it."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and a test asks for it
    with (tree.parent / "output").open("w") as output:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != root)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bench", "tests", "vlm_lora")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True  # bytecode is told from older one by second and size: not enough here
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tree.parent / "home")}
    import pytest

    first, options = _FirstFailure(), ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    with contextlib.suppress(ImportError):
        importlib.import_module("hypothesis")
        options.append("--hypothesis-seed=0")
    code = pytest.main([*options, f"--basetemp={tree.parent / 'tmp'}", *tests], plugins=[first])
    (tree.parent / "outcome").write_text("" if code == 0 else first.name or f"pytest, exit code {int(code)}")


def tested(tree: Path, root: Path, tests: Sequence[str], limit: float) -> tuple[str | None, float]:
    """Which test failed first (or "time limit", "crash"), None if none did; and the seconds it took."""
    started, outcome = time.monotonic(), tree.parent / "outcome"
    outcome.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=_test_here, args=(tree, root, tests))
    process.start()
    process.join(limit)
    in_time = process.exitcode is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with all that the tests have started
    process.join()
    said = (outcome.read_text() or None) if outcome.exists() else "crash"
    return said if in_time else "time limit", time.monotonic() - started


def copy_tree(root: Path, tree: Path) -> Path:
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
    return tree


Asked = tuple[Mutant, Sequence[str]]
"""A mutant, and the tests that should see it."""


def drawn(
    root: Path, table: Mapping[str, Sequence[str]], count: int, seed: int, known: Sequence[Mapping] = ()
) -> list[Asked]:
    """The mutants that are ``known``, then ``count`` drawn ones, modules by turns."""
    share, more = divmod(count, len(table))
    each = [
        draw(mutants((root / file).read_text(encoding="utf-8"), file), share + (i < more), f"{seed}/{file}")
        for i, file in enumerate(table)
    ]
    queue: list[Asked] = list(zip(known_mutants(known, root), (entry["tests"] for entry in known), strict=True))
    return queue + [(some[i], table[some[i].file]) for i in range(share + 1) for some in each if i < len(some)]


def survivors(
    root: Path, table: Mapping[str, Sequence[str]], rows: Sequence[Mapping], known: Sequence[Mapping] = ()
) -> list[Asked]:
    """Those of a record's mutants that no test saw, in the code of today, but for lines that are gone."""
    found: list[Asked] = []
    for row in rows:
        if row["killed_by"] is not None or "equivalent" in row:
            continue
        entries = [entry for entry in known if entry["what"] == row["operator"]]
        if entries:
            found += zip(known_mutants(entries, root), (entry["tests"] for entry in entries), strict=True)
        elif row["file"] in table:
            everything = mutants((root / row["file"]).read_text(encoding="utf-8"), row["file"])
            same = [m for m in everything if all(getattr(m, k) == row[k] for k in ("operator", "before", "after"))]
            found += [(mutant, table[row["file"]]) for mutant in same[:1]]
    return found


def killed_before(queue: Sequence[Asked], rows: Sequence[Mapping]) -> list[Asked]:
    """The same mutants, with the test that killed them in these rows of a record."""
    names = ("file", "operator", "before", "after")
    killers = {tuple(row[name] for name in names): row["killed_by"] for row in rows if "::" in (row["killed_by"] or "")}
    return [
        (replace(mutant, killed_by=killers.get(tuple(getattr(mutant, name) for name in names))), tests)
        for mutant, tests in queue
    ]


def run(
    root: Path, queue: Sequence[Asked], jobs: int = 1, budget: float = float("inf"), tell=print,
    loaded: Sequence[str] = (), grace: float = 30,
) -> list[Mutant]:  # fmt: skip
    """The mutants that were tested within the budget of seconds, with what killed them.

    The test that killed a mutant before is asked first, to save time. ``loaded`` names what every fork finds imported;
    ``grace`` are seconds on top of the usual time of the tests.
    """
    started = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the latter as tests/conftest.py, but before imports
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(loaded))
    sources = {mutant.file: (root / mutant.file).read_text(encoding="utf-8") for mutant, _ in queue}
    with tempfile.TemporaryDirectory() as temporary:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            trees.put(copy_tree(root, Path(temporary, str(job), "tree")))

        def unchanged(tests: Sequence[str]) -> float:
            tree = trees.get()
            killer, seconds = tested(tree, root, tests, 3600)
            trees.put(tree)
            if killer:
                output = (tree.parent / "output").read_text()[-2000:]
                raise SystemExit(f"{killer} fails on the unchanged code:\n{output}")
            tell(f"{', '.join(tests)}: all pass, {seconds:.0f} s")
            return seconds

        def test(asked: Asked) -> Mutant | None:
            mutant, tests = asked
            if time.monotonic() - started > budget:
                return None
            tree = trees.get()
            (tree / mutant.file).write_text(mutated(sources[mutant.file], mutant), encoding="utf-8")
            limit = grace + 4 * sum(usual[test] for test in tests)
            killer, seconds = tested(tree, root, [mutant.killed_by] if mutant.killed_by else tests, limit)
            if mutant.killed_by and killer != mutant.killed_by:  # it has another name today, or sees the change no more
                killer, seconds = tested(tree, root, tests, limit)
            (tree / mutant.file).write_text(sources[mutant.file], encoding="utf-8")
            trees.put(tree)
            tell(f"{mutant.file}:{mutant.line} {mutant.operator}: {killer or 'survived'} ({seconds:.0f} s)")
            return replace(mutant, killed_by=killer, seconds=round(seconds, 1))

        with ThreadPoolExecutor(jobs) as pool:
            single = sorted({name for _, tests in queue for name in tests})
            usual = dict(zip(single, pool.map(unchanged, [[name] for name in single]), strict=True))
            return [mutant for mutant in pool.map(test, queue) if mutant]


def record(results: Sequence[Mutant], equivalent: Sequence[Mapping[str, str]]) -> dict:
    """Counts a module, and each mutant; those listed as equivalent are not counted."""
    known = {(entry["file"], entry["line"], entry["operator"]): entry["reason"] for entry in equivalent}
    modules: dict[str, dict[str, int]] = {}
    rows = []
    for mutant in results:
        counts = modules.setdefault(mutant.file, {"drawn": 0, "killed": 0, "survived": 0})
        reason = known.get((mutant.file, mutant.key, mutant.operator)) if mutant.killed_by is None else None
        if not reason:
            counts["drawn"] += 1
            counts["survived" if mutant.killed_by is None else "killed"] += 1
        row = {name: value for name, value in asdict(mutant).items() if name not in ("start", "end", "new", "key")}
        rows.append(row | ({"equivalent": reason} if reason else {}))
    total = {name: sum(counts[name] for counts in modules.values()) for name in ("drawn", "killed", "survived")}
    return {"total": total, "modules": modules, "mutants": rows}


def print_record(result: dict) -> None:
    rows = [*result["modules"].items(), ("all", result["total"])]
    print(f"\n{'module':40} drawn  killed  survived")
    for name, counts in rows:
        print(f"{name:40} {counts['drawn']:5} {counts['killed']:7} {counts['survived']:9}")
    for row in result["mutants"]:
        if row["killed_by"] is None and "equivalent" not in row:
            print(f"\n{row['file']}:{row['line']} {row['operator']}\n- {row['before']}\n+ {row['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=70, metavar="N", help="mutants, over all modules (default: 70)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--modules", nargs="+", default=[""], metavar="NAME", help="parts of their paths; default: all")
    parser.add_argument("--again", type=Path, metavar="FILE", help="those that survived in this record, and no others")
    parser.add_argument("--before", type=Path, metavar="FILE", help="a record: ask first what killed a mutant there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (default: 1)")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), metavar="X", help="begin none later")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/mutations.json", metavar="FILE")
    options = parser.parse_args()
    chosen = {file: tests for file, tests in TESTS.items() if any(name in file for name in options.modules)}
    if gone := [name for name in {*chosen, *sum(chosen.values(), ())} if not (ROOT / name.partition("::")[0]).exists()]:
        raise SystemExit(f"not there any more, adjust TESTS in {Path(__file__).name}: {', '.join(gone)}")
    budget = 60 * options.budget_minutes
    known = [e for e in json.loads(KNOWN.read_text()) if any(name in e["file"] for name in options.modules)]
    equivalent = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    if options.again:
        before = json.loads(options.again.read_text(encoding="utf-8"))
        queue = survivors(ROOT, chosen, before["mutants"], known)
    else:
        queue = drawn(ROOT, chosen, options.count, options.seed, known)
    if options.before:
        queue = killed_before(queue, json.loads(options.before.read_text(encoding="utf-8"))["mutants"])
    result = record(run(ROOT, queue, options.jobs, budget, loaded=LOADED_ONCE), equivalent)
    print_record(result)
    from bench.origin import origin  # loads the package: not before the forks

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    facts = origin("mutations", f"{platform.machine()}, one thread a process")
    facts |= {"seed": options.seed, "commit": commit.stdout.strip()}
    options.output.write_text(json.dumps(facts | result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
