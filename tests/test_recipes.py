"""Every recipe, tried: its settings are right, and a run by it learns small data of its shape.

Run: pytest tests/test_recipes.py
"""

import json
import math

import pytest

from tests.conftest import ROOT, picture
from tests.model.test_qlora import needs_bitsandbytes
from vlm_lora.cli import main
from vlm_lora.config import config_from, read_yaml

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ROWS = {
    "questions": {"question": "Colour?", "answer": "red", "question_type": "colour"},
    "text-to-json": {"question": "Read this receipt as JSON.", "answer": '{"total": "9.50", "items": ["tea"]}'},
    "boxes": {
        "messages": [{"role": "user", "content": "Find the <ref-object>."}, {"role": "assistant", "content": "<bbox>"}],
        "objects": {"ref": ["blob"], "bbox": [[4, 4, 40, 50]]},
    },
}
"""What stands beside the image in a row of the data that a recipe is for; else a caption."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of data for each recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
    for recipe in RECIPES:
        row = ROWS.get(recipe.stem, {"caption": "Coloured blobs."})
        key = "images" if "messages" in row else "image"
        rows = [{key: [f"{i}.png"] if key == "images" else f"{i}.png", **row} for i in range(8)]
        (folder / f"{recipe.stem}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_when_and_why_and_has_settings_that_are_right(recipe):
    head = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# When: ") for line in head)
    config = config_from(read_yaml(recipe), recipe.name)
    assert config.output is None
    assert f"(../recipes/{recipe.name})" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


@needs_bitsandbytes
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, data, tmp_path):
    command = ["train", str(data / f"{recipe.stem}.jsonl"), "--config", str(recipe), "--model", "tiny", "--no-eval"]
    assert main([*command, "--max-steps", "2", "--val-split", "0.25", "--output", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 1
    assert all(map(math.isfinite, losses))
