"""Imports go downwards only, and the light commands stay light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vlm_lora"

# Lowest first. A module may import from its own wing and from the wings below it.
ORDER = ["errors|version|console", "config", "data", "model", "check|inference|training", "progress", "run"]
ORDER += ["demo", "cli"]
HEAVY = {"torch", "transformers", "peft", "accelerate", "gradio", "datasets", "PIL", "numpy"}


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level(name: str) -> int:
    return next(i for i, names in enumerate(ORDER) if name in names.split("|"))


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm_lora"):
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.startswith("vlm_lora"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    own = parts[0]
    for module, names in imports(path):
        if module == "vlm_lora" and names == ["__version__"]:
            continue
        if module == "vlm_lora":  # the public names; only the top may use them
            assert own in ("demo", "cli"), f"{path.name} imports the package from inside: {names}"
            continue
        other = wing(module)
        allowed = other == own or level(other) < level(own)
        assert allowed, f"{own} must not know {other} ({path.name} imports {module})"


def test_no_module_needs_itself():
    """Within a wing too, imports go one way, also those that wait in a function."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    needs = {
        module.removesuffix(".__init__"): {
            deeper if (deeper := f"{other}.{name}") in files else other
            for other, names in imports(path)
            for name in names or [""]
        }
        for module, path in files.items()
        if path != PACKAGE / "__init__.py"  # names the public ones, for type checkers
    }
    assert tuple(graphlib.TopologicalSorter(needs).static_order())


def test_nothing_but_the_table_asks_which_family_a_model_is_of():
    from vlm_lora.model.families import FAMILIES

    names = {*FAMILIES, *(family.class_name for family in FAMILIES.values())}
    for path in PACKAGE.rglob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert path.name == "families.py" or not texts & names, path


def test_the_demo_uses_the_public_names_only():
    for path in (PACKAGE / "demo").glob("*.py"):
        for module, names in imports(path):
            if (module, names) == ("vlm_lora.inference.scoring", ["Answered"]):  # for type checkers alone
                continue
            if module in ("vlm_lora.inference.sinks", "vlm_lora.data.readers.folders"):
                continue  # the command's own, so that both find the same pictures, and resume what the other began
            assert wing(module) in ("__init__", "errors", "config", "console", "demo"), module


def loaded_by(*command: str) -> set[str]:
    code = "import sys; sys.argv[0] = 'vlm-lora'; exec(sys.argv.pop(1)); "
    code += f"print('\\nLOADED', *set({sorted(HEAVY)!r}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("LOADED")[2].split())


def test_import_is_light():
    assert loaded_by("import vlm_lora; vlm_lora.__version__") == set()


VERBS = ("", "train", "caption", "eval", "check", "plan", "merge", "push", "demo", "cache", "doctor", "completion")


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_light(verb):
    code = "import contextlib, vlm_lora.cli as c\nwith contextlib.suppress(SystemExit): c.main(sys.argv[1:])"
    assert loaded_by(code, *([verb] if verb else []), "--help") == set()


def test_every_public_name_can_be_imported():
    import vlm_lora

    assert sorted(vlm_lora.__all__) == sorted(vlm_lora._HOMES)
    for name in vlm_lora.__all__:
        assert getattr(vlm_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vlm_lora.nonsense  # noqa: B018
