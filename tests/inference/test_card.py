"""The model card, read back by the hub's own parser."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.test_report import evaluated
from vlm_lora.config import TrainConfig
from vlm_lora.inference import card as module
from vlm_lora.inference.card import update_card, write_card
from vlm_lora.inference.scores import Scores

CONFIG = TrainConfig(data="photos")
GIVEN = {
    "counts": "30 images learnt with 150 answers, 3 held out, 1 rows left out",
    "fingerprint": "f" * 64,
    "command": "vlm-lora train photos --output runs/run-1",
    "template_options": {},
}


def test_a_card_says_what_the_chat_template_must_be_told(adapter, monkeypatch):
    monkeypatch.setattr(module, "_licence", lambda base: None)
    told = "vLLM is by\n`--default-chat-template-kwargs '{\"enable_thinking\": false}'`"
    for options, is_told in (({"enable_thinking": False}, True), ({}, False)):
        card = ModelCard.load(write_card(adapter, CONFIG, **GIVEN | {"template_options": options}, scores=None))
        assert (told in card.text) == is_told


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "run-1/adapter"
    folder.mkdir(parents=True)
    contract = {
        "base": "Qwen/Qwen2-VL-2B-Instruct", "base_fingerprint": "b" * 64, "tower_fingerprint": "t" * 64,
        "method": "lora", "prompt": 'Say "it": {now}', "min_pixels": 3136, "max_pixels": 1003520, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def scores_of(folder, better: int) -> Scores:
    folder.mkdir()
    rows = [("dog", "cat", ["cat"])] * better + [("cat", "cat", ["cat"])] * (30 - better)
    return evaluated(folder, rows).scores


def test_a_card_holds_what_the_hub_and_a_reader_want(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_licence", lambda base: "apache-2.0")
    scores = scores_of(tmp_path / "data", 20)
    card = ModelCard.load(write_card(adapter, CONFIG, **GIVEN, scores=scores))
    assert card.data.pipeline_tag == "image-text-to-text"
    assert (card.data.library_name, card.data.base_model) == ("peft", "Qwen/Qwen2-VL-2B-Instruct")
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["vlm-lora", "lora"])
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "run-1"
    assert {r.metric_type: r.metric_value for r in results}["exact_match"] == scores.tuned.exact_match == 1.0
    assert {(r.dataset_name, r.task_type) for r in results} == {("photos, held out", "image-text-to-text")}
    for told in (
        GIVEN["counts"], "`ffffffffffffffff`",
        "`vlm-lora train photos --output runs/run-1`", "Say 'it': {now}", "3,136 to 1,003,520 pixels",
        "rank 16; alpha 32;", "transformers ", "apache-2.0", "## Limits",
        "exact match rose from 33.3\u00a0% to 100.0\u00a0%",
        "|  | Base | Base, asked for one word | Commonest answer | Tuned | Gain |",
        "| Exact match | 33.3\u00a0% (16.7 to 50.0) | 33.3\u00a0% (16.7 to 50.0) | 0.0\u00a0% (0.0 to 0.0) | "
        "100.0\u00a0% (100.0 to 100.0) | +66.7",
    ):  # fmt: skip
        assert told in card.text, told


@pytest.mark.parametrize(
    ("given", "told", "library"),
    [
        (
            {"variant": "pissa"},
            "variant pissa; targets language,projector; rank 16; alpha 32; projector rank 16",
            "peft",
        ),
        ({"variant": "rslora", "projector_rank": 64}, "projector rank 64; projector alpha 64.0", "peft"),
        ({"method": "qlora", "targets": "language"}, "targets language; rank 16; alpha 32; dropout 0.0.", "peft"),
        ({"method": "adapter"}, "Settings: bottleneck 16.", "vlm-lora"),
        ({"method": "prefix", "num_virtual_tokens": 8}, "Settings: num virtual tokens 8.", "vlm-lora"),
        ({"method": "prompt"}, "Settings: num virtual tokens 16.", "vlm-lora"),
    ],
)
def test_settings_and_library_of_each_method(adapter, given, told, library):
    config = CONFIG.replace(**given)
    contract = json.loads((adapter / "contract.json").read_text())
    (adapter / "contract.json").write_text(json.dumps(contract | {"method": config.method, "base": "model"}))
    card = ModelCard.load(write_card(adapter, config, **GIVEN, scores=None))
    assert told in card.text
    assert card.data.library_name == library
    assert "its vision tower frozen" in card.text


def test_evaluating_again_replaces_its_own_part_only(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_licence", lambda base: None)
    path = write_card(adapter, CONFIG, **GIVEN, scores=scores_of(tmp_path / "data", 20))
    before = ModelCard.load(path)
    assert before.data.license is None
    assert update_card(adapter, scores_of(tmp_path / "other", 10), "test set (2)") == path
    assert update_card(adapter, scores_of(tmp_path / "again", 25), "test set (2)") == path
    after = ModelCard.load(path)
    values = {r.dataset_name: r.metric_value for r in after.data.eval_results if r.metric_type == "exact_match"}
    assert values == {"photos, held out": 1.0, "test set (2)": 1.0}
    assert after.text.count("## On test set (2)\n") == after.text.count("## On photos, held out\n") == 1
    assert "16.7\u00a0%" in after.text  # of the last evaluation's base
    assert before.text.partition("## What it was trained on")[2] == after.text.partition("## What it was trained on")[2]


def test_no_scores_local_base_and_cards_of_others(adapter, tmp_path):
    contract = json.loads((adapter / "contract.json").read_text())
    (adapter / "contract.json").write_text(json.dumps(contract | {"base": str(tmp_path / "secret/model")}))
    card = ModelCard.load(write_card(adapter, CONFIG, **GIVEN, scores=None))
    assert (card.data.base_model, card.data.eval_results) == (None, None)
    assert "secret" not in card.content  # a path tells of the machine
    assert "`model`" in card.text
    (adapter / "README.md").write_text("---\ntags: [other]\n---\nmine")
    scores = scores_of(tmp_path / "data", 3)
    assert update_card(adapter, scores, "x") is None
    (adapter / "README.md").unlink()
    assert update_card(adapter, scores, "x") is None


def test_the_licence_is_asked_of_the_hub_and_may_stay_unknown(tmp_path, monkeypatch):
    assert module._licence("Qwen/Qwen2-VL-2B-Instruct") is None  # tests are offline
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(module, "hf_hub_download", lambda *_: tmp_path / "README.md")
    assert module._licence("any/model") == "mit"
    assert module._licence(str(tmp_path)) == "mit"
    assert module._licence("tiny") == "apache-2.0"
