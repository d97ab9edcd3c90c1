"""The notebooks: they can be opened, their code compiles, and (long) they run from a clean kernel.

Run: pytest tests/test_notebooks.py -m "long or not long"
"""

import ast
import json
import os

import pytest

from tests.conftest import ROOT, picture

LOCAL, HOSTED = ROOT / "demos/finetune.ipynb", ROOT / "demos/finetune_gpu.ipynb"


def code_of(path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", [LOCAL, HOSTED], ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_uses_what_is_there(path):
    import vlm_lora

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "outputs are not committed"
    lines = [line for code in code_of(path) for line in code.splitlines()]
    python = "\n".join(line for line in lines if not line.startswith(("%", "!")))
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.ImportFrom) and node.module == "vlm_lora":
            assert {name.name for name in node.names} <= set(vlm_lora.__all__)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TrainConfig":
            assert {word.arg for word in node.keywords} <= set(vlm_lora.TrainConfig.__slots__)


def ran(path, place, change=lambda code: code) -> str:
    """All outputs of a notebook that was run in a folder, by a kernel of its own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = change(cell.source)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(place)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    return json.dumps([cell.get("outputs") for cell in notebook.cells])


@pytest.mark.long
def test_the_notebook_runs_from_data_to_captions():
    told = ran(LOCAL, ROOT / "demos")
    assert "<progress max" in told
    assert "<iframe sandbox srcdoc=" in told
    assert told.count("image/png") >= 5, "the data's picture and four that were captioned"
    assert "<table><tr><th></th><th>Base</th>" in told


@pytest.mark.long
def test_the_hosted_notebook_runs_as_far_as_the_embedded_model_allows(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "more").mkdir()
    for i in range(20):
        picture(i).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"Blobs, number {i}.")
    picture(99).save(tmp_path / "more/new.png")
    changes = {
        "hf-stream:OWNER/NAME:train[:1000]": "photos",
        "Qwen/Qwen2-VL-2B-Instruct": "tiny",
        '%pip install -q "vlm-lora[gpu,qlora]"': "",
    }

    def change(code: str) -> str:
        for old, new in changes.items():
            code = code.replace(old, new)
        return code

    told = ran(HOSTED, tmp_path, change)
    assert "No problem found." in told
    assert "more/new.png" in told
    assert (tmp_path / "adapter.zip").is_file()
