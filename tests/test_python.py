"""From Python: `train`, `read_dataset` and `evaluate` as one types them; what they print, and show in a notebook.

Run: pytest tests/test_python.py
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import vlm_lora
from tests.conftest import ROOT, picture
from vlm_lora.console import Progress, say


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two steps, as Python's `train` makes it, and what it printed."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "photos").mkdir()
    for i in range(10):
        picture(i).save(folder / f"photos/{i}.png")
        (folder / f"photos/{i}.txt").write_text("<b>blobs</b>")
    told, patch = [], pytest.MonkeyPatch()
    patch.setattr("vlm_lora.console.to_stderr", lambda text, end="\n": told.append(text))
    patch.chdir(folder)
    config = vlm_lora.TrainConfig(data="photos", model="tiny", max_steps=2, output="run")
    result = vlm_lora.train(config)
    captioner = vlm_lora.Captioner.load(adapter="run")
    dataset = vlm_lora.read_dataset("photos")
    (first, second, *_) = dataset.examples
    marked = vlm_lora.evaluate(captioner, vlm_lora.Dataset("captions", (first,), (), test=(second,)))
    yield SimpleNamespace(
        marked=marked,
        second=second,
        captioner=captioner,
        result=result,
        told=told,
        dataset=dataset,
        evaluation=vlm_lora.evaluate(captioner, dataset),
        folder=folder,
    )
    patch.undo()


def test_train_tells_what_it_does(place):
    assert any("Data: sidecar. 9 images" in text for text in place.told)
    assert any("step 2/2  loss" in text for text in place.told)


def test_the_page_about_python_runs(place, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert "<Dataset of sidecar: 10 examples, 10 answers>" in capsys.readouterr().out


def test_results_are_short_in_text(place):
    assert repr(place.result).startswith("<run: 2 steps. ")
    assert repr(place.dataset) == "<Dataset of sidecar: 10 examples, 10 answers>"
    assert repr(place.evaluation).startswith("<Evaluation of 10 answers. ")
    assert repr(place.evaluation.scores).startswith("<Scores of 10 answers. Captions, CIDEr-D: base ")
    assert repr(place.captioner) == "<Captioner: lora adapter on tiny, prompt 'Describe this image.'>"
    assert all(len(repr(each)) < 600 for each in (place.result, place.dataset, place.evaluation))


def test_a_name_in_the_place_of_what_is_read_from_it_is_answered(place):
    with pytest.raises(vlm_lora.VlmLoraError, match=r"train\(TrainConfig\(data='photos'\)\); found 'photos'"):
        vlm_lora.train("photos")
    with pytest.raises(vlm_lora.VlmLoraError, match=r"read_dataset\('photos'\)"):
        vlm_lora.evaluate(place.captioner, "photos")
    with pytest.raises(vlm_lora.VlmLoraError, match=r"holds no config\.json.*in Python adapter="):
        vlm_lora.Captioner.load("run")
    assert vlm_lora.read_losses("run") == vlm_lora.read_losses(Path("run"))


def test_a_notebook_shows_the_report_and_runs_nothing(place):
    page = place.result._repr_html_()
    assert page.startswith("<iframe sandbox srcdoc=")
    assert "data:image/" in page
    shown = place.evaluation._repr_html_()
    assert "<table><tr><th></th><th>Base</th>" in shown
    assert "<b>blobs" not in page + shown, "what data and models say is escaped"


def test_a_dataset_with_parts_is_evaluated_on_its_test_part(place):
    captioner = SimpleNamespace(tuned=False, quantised=False)
    empty = vlm_lora.Dataset("captions", (), ())
    with pytest.raises(vlm_lora.VlmLoraError, match="no held-out examples"):
        vlm_lora.evaluate(captioner, empty)
    assert [row.images for row in place.marked.answered] == [place.second.images]


def heard(captioner, examples, monkeypatch, **how) -> tuple[list[tuple[str, str]], vlm_lora.Evaluation]:
    """The questions, each with its system message, that an evaluation asks; nothing is decoded."""
    questions = []

    def respond(asked, **_):
        questions.extend((request.turns[-1].user, request.system) for _, requests in asked for request in requests)
        return [["a blob"] * len(requests) for _, requests in asked]

    monkeypatch.setattr(captioner, "respond", respond)
    evaluation = vlm_lora.evaluate(captioner, examples, **how)
    return list(dict.fromkeys(questions)), evaluation


def test_captions_are_asked_for_as_the_adapter_was_trained(place, monkeypatch):
    captioner = place.captioner
    monkeypatch.setattr(captioner, "prompt", "Say it.")
    monkeypatch.setattr(captioner, "system", "Be brief.")
    few = place.dataset.examples[:2]
    assert heard(captioner, few, monkeypatch)[0] == [("Say it.", "Be brief.")]
    assert heard(captioner, few, monkeypatch, also=few)[1].scores.also
    assert heard(captioner, few, monkeypatch, prompt="List it.")[0] == [("List it.", "")]
    chosen = vlm_lora.read_dataset("photos", prompt="What is it?", system="Be kind.").examples[:2]
    assert heard(captioner, chosen, monkeypatch)[0] == [("What is it?", "Be kind.")]
    # A row's own question stays, whatever it says.
    rows = [{"file_name": f"{i}.png", "text": "blobs", "prompt": vlm_lora.TrainConfig(data="x").prompt} for i in (0, 1)]
    (place.folder / "photos/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = vlm_lora.read_dataset("photos/rows.jsonl").examples
    (place.folder / "photos/rows.jsonl").unlink()
    assert heard(captioner, own, monkeypatch)[0] == [("Describe this image.", "Be brief.")]


def test_a_prompt_with_variables_never_gives_the_caption_away(place, monkeypatch):
    """Beside a picture of the data, 0.txt holds what is to be said, and not tags."""
    monkeypatch.setattr(place.captioner, "prompt", "It is called {stem}.")
    with pytest.raises(vlm_lora.VlmLoraError, match=r"has variables.*read_dataset\(\.\.\., prompt=captioner\.prompt\)"):
        heard(place.captioner, place.dataset.examples, monkeypatch)
    read = vlm_lora.read_dataset("photos", prompt=place.captioner.prompt)
    assert heard(place.captioner, read.examples[:1], monkeypatch)[0] == [("It is called 0.", "")]


def test_one_image_is_captioned_like_several(place):
    (caption,) = place.captioner.caption("photos/0.png")
    assert (caption.image, caption.error) == ("photos/0.png", None)


def test_settings_are_paths_or_text_and_have_a_type(place):
    config = vlm_lora.TrainConfig(data=[Path("photos"), "more"], output=Path("runs") / "x", epochs=2)
    assert (config.data, config.output) == (("photos", "more"), "runs/x")
    for wrong in ({"epochs": "3"}, {"rank": 8.5}, {"rank": True}, {"cache": 1}, {"output": 3}, {"data": []}):
        with pytest.raises(vlm_lora.VlmLoraError, match=rf"--{next(iter(wrong))} is .*; expected"):
            vlm_lora.TrainConfig(**{"data": "photos"} | wrong)


def test_progress_in_a_notebook_is_one_bar(monkeypatch, capsys):
    drawn = []

    class Handle:
        def update(self, html):
            drawn.append(html)

    def display(html, display_id):
        drawn.append(html)
        return Handle()

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    progress = Progress()
    progress.pause = 0
    progress.count("Images <prepared>:", 1, 4)
    progress.count("Images <prepared>:", 4, 4)
    say("done")
    assert [part.count('value="') for part in drawn] == [1, 1]
    assert 'value="0.2500"' in drawn[0]
    assert "Images &lt;prepared&gt;: 4 of 4" in drawn[1]
    assert capsys.readouterr() == ("done\n", "")
