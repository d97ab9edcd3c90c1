"""From Python: `train`, `read_dataset` and `evaluate` as one types them; what they print, and show in a notebook.

Run: pytest tests/test_python.py
"""

import re
import sys
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
    assert all(len(repr(each)) < 600 for each in (place.result, place.dataset, place.evaluation))


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
