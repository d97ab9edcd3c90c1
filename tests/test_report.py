"""The picture report: what it says about the gain; that nothing in it is fetched or executed; its size."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Dialogue, Example, ImageRef, Turn
from vlm_lora.errors import DataError
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.commonest import Commonest
from vlm_lora.inference.evaluate import evaluate
from vlm_lora.inference.evaluation import Evaluation
from vlm_lora.inference.report import PICTURES, write_report
from vlm_lora.inference.scores import FEW_IMAGES, METRICS, TASKS, FailedExample, KindScores, Metric, Scores
from vlm_lora.inference.scoring import Answered
from vlm_lora.inference.tasks import ANSWERS
from vlm_lora.inference.verdict import headlines, score_table, summary, tables_as_text
from vlm_lora.run import train
from vlm_lora.training.events import Events

NASTY = "<img src=x onerror=alert(1)> </dd><script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "line", "circle", "polyline", "rect", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's text, its tags and its marked words; asserts that tags are closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.marked: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if self.open[-1] == "mark":
                self.marked.append(data)

    def named(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


class Parrot:
    """Says what it was told to: base and tuned answers by example and question."""

    def __init__(self, rows: list[tuple[str, str]], adapter: bool = True):
        self.rows, self.tuned, self.quantised = rows, adapter, False
        self.broken: dict[str, DataError] = {}

    def respond(self, asked, *, tuned=True, decoding=None):
        return [
            self.broken.get(images[0].name) or [self.rows[int(images[0].name[:-4])][tuned] for _ in turns]
            for images, turns in asked
        ]


ELSEWHERE = Commonest("training", {"answers": "a horse", "captions": "A horse."}, {}, {})
"""Training that said nothing of what is asked here, so that guessing is of no use."""


def evaluated(  # arguments: what is asked, and what there is to know about it
    folder: Path,
    rows: list[tuple[str, str, list[str]]],
    adapter=True,
    also: int = 0,
    commonest: Commonest | None = ELSEWHERE,
    **extra,
) -> Evaluation:
    """An Evaluation of (base, tuned, references), one image each; the first ``also`` are the other data too."""
    examples = []
    for i, (_, _, references) in enumerate(rows):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 30), (i % 256, 90, 200)).save(path)
        dialogues = tuple(Dialogue((Turn("What is it?", text),), **extra) for text in references)
        examples.append(Example(str(i), (ImageRef(path=path, name=path.name),), dialogues, f"data:{i}"))
    return evaluate(Parrot([row[:2] for row in rows], adapter), examples, also=examples[:also], commonest=commonest)


def test_a_metric_is_added_by_an_entry_of_the_table_and_its_name_in_a_task(tmp_path, monkeypatch):
    """As docs/architecture.md says."""
    letters = Metric("letters", "how many letters", lambda answers, *_: [float(len(a)) for a in answers], False, 99.0)
    monkeypatch.setitem(METRICS, "letters", letters)
    questions = TASKS[ANSWERS]
    monkeypatch.setitem(TASKS, ANSWERS, replace(questions, metrics=(*questions.metrics, "letters")))
    scores = evaluated(tmp_path, [("dog", "horse", ["cat"])] * 3).scores
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    assert [scores.tasks[ANSWERS].scores[who]["letters"] for who in ("base", "tuned")] == [3.0, 5.0]
    assert "Letters" in tables_as_text(scores)


def test_gain_is_said_in_one_sentence_and_pictures_are_inside(tmp_path):
    rows = [("dog", "cat", ["cat"])] * 20 + [("cat", "cat", ["cat"])] * 6 + [("cat", "dog", ["cat"])] * 4
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 3 / s, "lr": 1e-4}) + "\n" for s in range(1, 200))
        + json.dumps({"step": 100, "held_out_loss": 0.5})
        + '\n{"step": 200, "loss": NaN}\n'
        + json.dumps(
            {
                "predicted": {"memory_by_part": {"base weights": 2_000_000_000, "an adapter": 700_000_000}},
                "measured": {"memory_bytes": 3_100_000_000, "reserved_bytes": 3_300_000_000},
            }
        )
        + '\n{"step": 201, "lo'
    )
    path = write_report(tmp_path, evaluated(tmp_path, rows), title="photos", command="vlm-lora train photos")
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert "Tuning helped: on 30 held-out images, exact match rose from 33.3 % to 86.7 %" in page.text
    assert "tuning made 20 better and 4 worse; 6 score the same" in page.text
    pictures = page.named("img")
    assert len(pictures) == PICTURES
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    assert page.text.index("Gained most") < page.text.index("Lost most")
    assert {"dog"} == set(page.marked) - {"Marked"}
    assert "over 199 steps" in page.text
    assert len(page.named("circle")) == 2  # the one held-out loss, and the legend's
    assert "vlm-lora train photos" in page.text
    memory = " ".join(page.text[page.text.index("Memory Predicted Measured") :].split())
    assert "base weights 2.0 GB an adapter 700.0 MB together 2.7 GB used at the highest 3.1 GB reserved" in memory
    assert "3.3 GB" in memory


def test_the_filmstrip_shows_how_the_captions_came_about(tmp_path):
    evaluation = evaluated(tmp_path, [("dog", "cat", ["cat"])] * 2)
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    for step, said in ((0, "a dog"), (20, "a dog"), (40, "cat")):
        names = {"image": "0.png", "question": "What is it?", "reference": "cat"}
        watched = [names | {"example": "0", "caption": said}, names | {"example": "elsewhere", "caption": ""}]
        lines.append({"step": step, "watched": watched})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "watched": [{'
    )
    page = Page(write_report(tmp_path, evaluation, title="photos"))
    told = page.text[page.text.index("While it learned") :]
    assert "over 40 steps. at the start step 40 the data says a dog cat cat" in told
    assert "The picture 0.png can no longer be read. nothing nothing cat" in told
    assert page.marked[:1] == ["a dog"]
    assert len(page.named("img")) == 3
    film = [Example("elsewhere", evaluation.answered[0].images, (), "")]
    assert len(Page(write_report(tmp_path, evaluation, title="photos", watched=film)).named("img")) == 4


def test_nothing_is_fetched_or_executed(tmp_path):
    rows = [(NASTY, NASTY + " of the tuned model", ["a cat " + NASTY])] * 25
    evaluation = evaluated(tmp_path, rows, kind=NASTY)
    watched = [dict.fromkeys(("image", "question", "reference", "caption"), NASTY) | {"example": "0"}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "watched": watched}))
    page = Page(write_report(tmp_path, evaluation, title=NASTY, command=NASTY))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"} == set()
    assert all(picture["src"].startswith("data:") for picture in page.named("img"))
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "url(" not in page.source
    assert "<img src=x onerror=alert(1)>" in page.text  # as text
    assert str(tmp_path) not in page.source


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("cat", "dog", ["cat"])] * 30, "Tuning did harm: on 30 held-out images, exact match fell"),
        (
            [("cat", "dog", ["cat"])] * 10 + [("dog", "cat", ["cat"])] * 11 + [("a", "a", ["a"])] * 40,
            "No gain that chance could not explain: on 61 held-out images",
        ),
        ([("dog", "cat", ["cat"])], "Too few images to tell: on 1 held-out image, exact match"),
    ],
)
def test_what_is_no_gain_is_not_called_one(tmp_path, rows, told):
    page = Page(write_report(tmp_path, evaluated(tmp_path, rows), title="photos"))
    assert told in page.text
    assert "Tuning helped" not in page.text
    assert "Loss" not in page.text.split()  # no metrics.jsonl, no curve


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("dog", "cat", ["cat"])] * 23 + [("dog", "dog", ["cat"])] * 7, ("77\u00a0%", "0\u00a0%", "good")),
        ([("cat", "dog", ["cat"])] * 30, ("0\u00a0%", "100\u00a0%", "bad")),
        ([("dog", "cat", ["cat"])] * 3, ("100\u00a0%", "0\u00a0%", "")),  # too few to tell
        ([("dog", "cat", ["cat"]), *[("cat", "cat", ["cat"])] * 299], ("100.0\u00a0%", "99.7\u00a0%", "")),
    ],
)
def test_the_figure_to_be_read_from_afar(tmp_path, rows, told):
    (line,) = headlines(evaluated(tmp_path, rows).scores)
    assert (line.tuned, line.base, line.verdict) == told
    assert line.of.startswith(f"exact match, tuned against base: {len(rows)} images")
    (line,) = headlines(evaluated(tmp_path, rows[-1:] * 3, adapter=False).scores)
    assert (line.base, line.verdict) == ("", "")
    assert "the base alone" in line.of


def test_a_gain_in_form_is_called_that(tmp_path):
    rows = [("It is a cat.", "cat", ["cat"])] * 30
    page = Page(write_report(tmp_path, evaluated(tmp_path, rows), title="photos"))
    assert "Part of it is form: the base model answers in 4.0 words on average" in page.text


def test_without_an_adapter(tmp_path):
    rows = [("cat", "", ["cat"])] * 3 + [("dog", "", ["cat"])]
    page = Page(write_report(tmp_path, evaluated(tmp_path, rows, adapter=False), title="base"))
    assert "The base model alone, on 4 held-out images: exact match 75.0 %" in page.text
    assert "Tuned" not in page.text
    assert "Gain" not in page.text


def test_captions_are_ranked_by_cider_and_compared_by_word(tmp_path):
    references = ["A red circle lies on the grass.", "There is a circle on grass."]
    rows = [
        ("Something else that is entirely wrong here.", "A red circle is on the grass.", references),
        ("图中有一个蓝色的圆", "图中有一个红色的圆", ["图中有一个红色的圆"]),
        ("A tree stands in the snow.", "A house stands in the snow.", ["A tree stands in the snow."]),
    ]
    evaluation = evaluated(tmp_path, rows, caption=True)
    page = Page(write_report(tmp_path, evaluation, title="captions"))
    assert "Something else that" in page.marked
    assert "蓝" in page.marked  # Han characters one by one
    assert page.text.index("Gained most") < page.text.index("红") < page.text.index("Lost most")
    assert page.text.count("What is it?") == 1  # asked of all, said once
    scored = [f"CIDEr-D {score:.2f}" for who in ("base", "tuned") for score in evaluation.values[who]["cider_d"]]
    assert sorted(re.findall(r"CIDEr-D [\d.]+", page.text[page.text.index("Gained most") :])) == sorted(scored)


def test_what_was_forgotten_is_told_apart(tmp_path):
    rows = [("cat", "dog", ["cat"])] * 25 + [("dog", "cat", ["cat"])] * 60
    evaluation = evaluated(tmp_path, rows, also=25)
    page = Page(write_report(tmp_path, evaluation, title="photos"))
    assert "Tuning helped: on 85 held-out images" in page.text
    assert page.text.index("what was forgotten") < page.text.index("Tuning did harm: on 25 held-out images")
    assert evaluation.scores.also.gain["exact_match"].gain == -1.0
    assert "p 0.001" in page.text
    told = tables_as_text(evaluation.scores)
    assert "+41.2 points (+" in told
    assert ", p 0." in told
    assert "Repeats itself" in told


def test_too_few_images_have_neither_colour_nor_p(tmp_path):
    for count, few in ((FEW_IMAGES - 1, True), (FEW_IMAGES, False)):
        evaluation = evaluated(tmp_path, [("dog", "cat", ["cat"])] * count)
        page = Page(write_report(tmp_path, evaluation, title="photos"))
        assert ("Too few images to tell" in page.text) == few
        assert ("good" not in {cell.get("class") for cell in page.named("td")}) == few
        assert ("p 0.001" not in page.text) == few
        assert ("p 0.001" not in tables_as_text(evaluation.scores)) == few


def test_kinds_of_questions_have_vqa_accuracy_too(tmp_path):
    evaluation = evaluated(tmp_path, [("a cat", "cat", ["cat"])] * 3, kind="animal")
    of_kind = {"answers": 3, "base": 0.0, "tuned": 1.0, "vqa_accuracy": {"base": 1.0, "tuned": 1.0}}
    assert evaluation.scores.by_kind == {"animal": KindScores(**of_kind)}
    assert evaluation.scores.to_json()["by_kind"] == {"animal": of_kind}
    text = " ".join(tables_as_text(evaluation.scores).split())
    same = "0.0 % (VQA accuracy 100.0 %)"  # of the base, also where it is asked for one word
    assert f"animal (3) {same} {same} 0.0 % (VQA accuracy 0.0 %) 100.0 % (VQA accuracy 100.0 %)" in text
    assert "0.0 % VQA accuracy 100.0 %" in Page(write_report(tmp_path, evaluation, title="kinds")).text


def test_an_output_that_cannot_be_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Captioner, "load", None)
    (tmp_path / "file").write_text("mine")
    assert main(["eval", str(tmp_path), "--model", "tiny", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("/file: cannot be made a folder (File exists); give another name.\n")


def test_the_folder_one_is_in_has_a_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos/0.png")
    (tmp_path / "photos/0.txt").write_text("cat")
    parrot = Parrot([("dog", "cat")], adapter=False)
    parrot.prompt, parrot.system = "What is it?", ""
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: parrot)
    monkeypatch.chdir(tmp_path / "photos")
    assert main(["eval", ".", "--model", "tiny", "--output", "../out"]) == 0
    assert "<title>photos</title>" in (tmp_path / "out/report.html").read_text()


def test_an_image_that_cannot_be_used_is_named_and_left_out(tmp_path):
    rows = [("dog", "cat", ["cat"])] * 4
    parrot = Parrot([row[:2] for row in rows])
    parrot.broken = {"2.png": DataError("'2.png' is damaged or cut off")}
    whole = evaluated(tmp_path, rows)
    examples = [
        Example(row.example, row.images, (Dialogue((Turn(row.question, "cat"),)),), f"data:{row.example}")
        for row in whole.answered
    ]
    evaluation = evaluate(parrot, examples)
    scores = evaluation.scores
    assert [(row.source, row.reason) for row in scores.failed] == [("data:2", "'2.png' is damaged or cut off")]
    assert [row.example for row in evaluation.answered] == ["0", "1", "3"]
    assert (scores.examples, scores.answers) == (3, 3)
    parrot.broken |= {name: DataError(f"'{name}' is empty") for name in ("0.png", "1.png", "3.png")}
    with pytest.raises(DataError, match=r"None of the 4 held-out images can be used; the first: .0\.png"):
        evaluate(parrot, examples)


def test_chinese_is_compared_by_character(tmp_path):
    rows = [("图中有一个蓝色的圆", "图中有一个红色的圆", ["图中有一个红色的大圆"])] * 2
    evaluation = evaluated(tmp_path, rows)
    scores = evaluation.scores
    evaluation.write(tmp_path / "out")
    assert Evaluation.read(tmp_path / "out").values == evaluation.values
    assert scores.tokens == "vlm-lora-char-1"
    assert scores.tuned.mean_words == 9
    assert 0.8 < scores.tuned.rouge_l < 1  # 0 or 1 if words were compared


def test_scores_are_the_same_after_json(tmp_path):
    rows = [("a cat", "cat", ["cat"]), ("dog", "cat", ["cat", "a cat sits"])] * 2
    scores = evaluated(tmp_path, rows, also=2, kind="animal").scores
    scores = replace(scores, blanked=scores.base, base_in_four_bits=True, failed=(FailedExample("x:1", "gone"),))
    by_kind = {kind: replace(row, blanked=0.5) for kind, row in scores.by_kind.items()}
    for full in (scores, replace(scores, by_kind=by_kind), evaluated(tmp_path, rows, adapter=False).scores):
        assert Scores.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert list(scores.to_json()) == [
        "examples", "answers", "tokens", "reference_words", "intervals", "base", "tuned", "blanked", "gain", "by_kind",
        "base_in_four_bits", "failed", "also", "tasks",
    ]  # fmt: skip


def test_an_earlier_evaluation_without_intervals_of_bleu_has_a_table(tmp_path):
    scores = evaluated(tmp_path, [("a red cat sits here", "a red cat sits", ["a red cat sits"])] * 2).scores
    document = json.loads(json.dumps(scores.to_json() | {"reference_words": 5.0}))
    for of_metric in (*document["intervals"].values(), document["gain"]):
        of_metric.pop("bleu_4")
    document["base"].pop("anls")  # as if it came later
    del document["tasks"]
    (of_task,) = Scores.from_json(document).tasks.values()
    table = " ".join(score_table(of_task).to_text().split())
    assert "BLEU-4 66.9 % 100.0 % +33.1 points ROUGE-L" in table


@pytest.mark.parametrize("eval_images", [0, 1, None])
def test_train_from_python_yields_what_the_command_yields(checkpoints, photo_folder, tmp_path, eval_images):
    settings = {"model": str(checkpoints["qwen2_vl"]), "output": str(tmp_path / "run"), "rank": 4, "max_steps": 1}
    compared = []

    class Watch(Events):
        def comparison(self, done, total):
            compared.append((done, total))

    config = TrainConfig(data=str(photo_folder), val_split=0.2, **settings)
    result = train(config, eval_images=eval_images, events=Watch())
    card = result.card.read_text(encoding="utf-8")
    assert result.card == tmp_path / "run/adapter/README.md"
    assert "10 images learnt with 10 answers, 2 held out, 0 rows left out" in card
    assert ("## On photos, held out" in card) == (eval_images != 0)
    if eval_images == 0:
        assert (result.evaluation, result.report, compared) == (None, None, [])
        return
    images = eval_images or 2
    assert len(result.evaluation.answered) == result.evaluation.scores.examples == images
    assert compared[-1] == (2 * images, 2 * images)
    assert result.report == tmp_path / "run/report.html"
    assert Evaluation.read(tmp_path / "run").scores == result.evaluation.scores


def test_the_data_decide_which_metrics_are_shown_not_how_much_the_model_says(tmp_path):
    wordy = "I think that this picture shows a cat"
    short = evaluated(tmp_path, [(wordy, wordy, ["cat"])] * 2)
    long = evaluated(tmp_path, [("cat", "cat", [wordy + " on a mat"])] * 2)
    captions = evaluated(tmp_path, [(wordy, wordy, ["cat"])] * 2, caption=True)
    asked = evaluated(tmp_path, [(wordy, wordy, ["cat"])] * 2)
    for evaluation, first in ((short, "exact_match"), (long, "rouge_l"), (captions, "cider_d")):
        (of_task,) = evaluation.scores.tasks.values()
        assert next(iter(of_task.metrics)) == first
    assert captions.scores.tuned == asked.scores.tuned  # over everything they are what they were


def test_what_earlier_versions_wrote_is_read(tmp_path):
    evaluation = evaluated(tmp_path, [("cat", "cat", ["I think that this picture shows a cat"])] * 2, caption=True)
    evaluation.write(tmp_path / "out")
    assert Evaluation.read(tmp_path / "out").scores == evaluation.scores
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    del scores["reference_words"], scores["tasks"]  # as releases before this one wrote them
    (tmp_path / "out/scores.json").write_text(json.dumps(scores))
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    for row in rows:
        del row["task"], row["commonest"]
    (tmp_path / "out/predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, (old,) = Evaluation.read(tmp_path / "out"), evaluation.scores.tasks.values()
    (of_task,) = read.scores.tasks.values()
    assert list(read.scores.tasks) == ["captions"]
    assert (read.scores.tuned, of_task.intervals["tuned"]) == (evaluation.scores.tuned, old.intervals["tuned"])
    assert of_task.scores == {who: of for who, of in old.scores.items() if who != "commonest"}
    assert read.ranks("tuned") == evaluation.ranks("tuned")
    assert summary(read.scores)[0] == summary(evaluation.scores)[0]


def test_the_report_opens_in_a_browser_without_a_complaint(tmp_path, browser):
    rows = [("dog", "cat " + NASTY, ["cat"])] * 25
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 3 / s}) + "\n" for s in range(1, 50))
    )
    path = write_report(tmp_path, evaluated(tmp_path, rows, also=20), title=NASTY, command="vlm-lora")
    told, asked = [], []
    page = browser.new_page()
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    shown = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    wide = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()
    assert told == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert (shown, wide) == (True, True)


def test_a_picture_that_is_gone_and_text_that_is_no_unicode(tmp_path):
    evaluation = evaluated(tmp_path, [("half \ud83d of a pair", "\u202eright to left", ["cat"])] * 2)
    (tmp_path / "0.png").unlink()
    page = Page(write_report(tmp_path, evaluation, title="photos"))
    assert "The picture 0.png can no longer be read." in page.text
    assert len(page.named("img")) == 1


def test_ten_thousand_answers_and_steps_stay_a_small_page(tmp_path):
    small = evaluated(tmp_path, [("dog", "cat", ["cat"]), ("cat", "dog", ["cat"])] * 10)
    many = tuple(
        Answered(str(i), row.images, row.question, None, row.references, row.base, row.tuned)
        for i, row in enumerate(small.answered * 500)
    )
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 1 + math.sin(s)}) + "\n" for s in range(20_000))
    )
    values = {who: {name: v * 500 for name, v in of.items()} for who, of in small.values.items()}
    path = write_report(tmp_path, Evaluation(many, small.scores, values), title="many")
    assert path.stat().st_size < 500_000
