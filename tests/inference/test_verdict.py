"""What is said of an evaluation: nothing is called a gain that guessing has too, and nothing is pooled."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.test_report import Page
from vlm_lora import Dialogue, Evaluation, Example, ImageRef, Turn, evaluate, read_dataset
from vlm_lora.errors import DataError
from vlm_lora.inference.commonest import OFTEN, Commonest
from vlm_lora.inference.evaluate import ONE_WORD, against
from vlm_lora.inference.metrics.captions import cider_d
from vlm_lora.inference.metrics.choices import chosen
from vlm_lora.inference.metrics.structured import compared
from vlm_lora.inference.report import write_report
from vlm_lora.inference.scores import Scores
from vlm_lora.inference.tasks import task_of
from vlm_lora.inference.verdict import columns_of, quoted, score_table, summary, tables_as_text, versus


class Told:
    """A model that was told what to say: by image and question, of base, base asked for one word, tuned, and tuned
    with the picture greyed out."""

    tuned, quantised = True, False

    def __init__(self, said: dict[tuple[int, str], dict[str, str]]):
        self.said, self.asked = said, []

    def respond(self, asked, *, tuned, decoding=None):
        return [[self._say(images[0], request, tuned) for request in requests] for images, requests in asked]

    def _say(self, image, request, tuned):
        question = request.turns[-1].user
        who = "tuned" if tuned else "one_word" if question.endswith(ONE_WORD) else "base"
        if isinstance(image, Image.Image):  # greyed out; its width tells which
            number, who = image.width - 10, "blanked"
        else:
            number = int(image.name[:-4])
        self.asked.append((who, question))
        return self.said[number, question.removesuffix("\n" + ONE_WORD)][who]


def asked(folder, rows, blanked=False, commonest=None, **how) -> Evaluation:
    """An evaluation of ``(image, dialogue, {who: answer})``."""
    by_image: dict[int, list] = {}
    for number, dialogue, _ in rows:
        by_image.setdefault(number, []).append(dialogue)
    examples = []
    for number, dialogues in by_image.items():
        path = folder / f"{number}.png"
        Image.new("RGB", (10 + number, 8), (number % 256, 90, 200)).save(path)
        examples.append(Example(str(number), (ImageRef(path, path.name),), tuple(dialogues), f"data:{number}"))
    said = {(number, dialogue.turns[-1].user): of for number, dialogue, of in rows}
    return evaluate(Told(said), examples, blanked=blanked, commonest=commonest, **how)


def yes_no(count, tuned, base="It may be so.", one_word="no", blanked="yes", kind=None, question="Is it {}?"):
    """Questions of which 56 % are to be answered with yes; ``tuned`` says who is right, by number."""
    rows = []
    for i in range(count):
        answer = "yes" if i % 25 < 14 else "no"
        other = {"yes": "no", "no": "yes"}[answer]
        said = {"base": base, "one_word": one_word, "blanked": blanked, "tuned": answer if tuned(i) else other}
        rows.append((i, Dialogue((Turn(question.format(i), answer),), kind), said))
    return rows


def captioned(count, tuned="A photo of thing {}."):
    rows = []
    for i in range(count):
        dialogue = Dialogue((Turn("Describe this image.", f"A photo of thing {i}."),), caption=True)
        said = dict.fromkeys(("base", "one_word", "blanked"), "Some words.") | {"tuned": tuned.format(i)}
        rows.append((i, dialogue, said))
    return rows


ALWAYS_YES = Commonest("training", {"answers": "yes"}, {}, {})


@pytest.mark.parametrize("commonest", [ALWAYS_YES, None])
def test_what_is_below_always_yes_is_not_called_helped(tmp_path, commonest):
    """The case of 26 November: 54 % right, always yes is 56 %, the base has 0 % as it speaks in sentences."""
    evaluation = asked(tmp_path, yes_no(100, lambda i: i % 50 < 27), commonest=commonest)
    scores = evaluation.scores.tasks["answers"].scores
    assert (scores["base"]["exact_match"], scores["tuned"]["exact_match"]) == (0.0, 0.54)
    assert scores["commonest"]["exact_match"] == 0.56
    report = Page(write_report(tmp_path, evaluation, title="yes or no")).text
    for told in (" ".join(summary(evaluation.scores)).replace("\u00a0", " "), report):
        assert "helped" not in told
        assert "No better than guessing without a look at the picture: on 100 held-out images" in told
        assert 'as "yes", has 56.0 % (tuned -2.0 points, ' in told
        assert f"The commonest answer of {'training' if commonest else 'the held-out data'}" in told
    assert "Commonest answer" in tables_as_text(evaluation.scores)
    worse = asked(tmp_path, yes_no(100, lambda i: i % 50 < 12), commonest=commonest)
    assert summary(worse.scores)[0].startswith("Worse than guessing without a look at the picture")


def test_what_beats_guessing_and_the_base_is_called_helped(tmp_path):
    evaluation = asked(tmp_path, yes_no(100, lambda i: i % 10 < 9), commonest=ALWAYS_YES)
    first, guessed, one_word = (line.replace("\u00a0", " ") for line in summary(evaluation.scores)[:3])
    assert first.startswith("Tuning helped: on 100 held-out images, exact match rose from 0.0 % to 90.0 %")
    assert "has 56.0 % (tuned +34.0 points, +" in guessed
    assert one_word.startswith("The base, asked for one word, has 44.0 % (tuned +46.0 points, +")


def test_a_base_that_knows_it_and_says_it_in_a_sentence_is_seen(tmp_path):
    rows = yes_no(100, lambda i: i % 10 < 9)
    rows = [(i, d, said | {"one_word": d.turns[-1].assistant if i % 10 != 8 else "maybe"}) for i, d, said in rows]
    evaluation = asked(tmp_path, rows, commonest=Commonest("training", {"answers": "perhaps"}, {}, {}))
    first = summary(evaluation.scores)[0].replace("\u00a0", " ")
    assert first.startswith("What tuning taught is the form, as far as can be told: on 100 held-out images")
    assert evaluation.scores.tasks["answers"].scores["one_word"]["exact_match"] == 0.9
    assert evaluation.scores.base.exact_match == 0.0


def test_what_stays_without_the_picture_is_called_guessed(tmp_path):
    for count, most in ((60, True), (30, False)):
        rows = yes_no(100, lambda i: i % 10 < 9)
        rows = [(i, d, s | {"blanked": d.turns[-1].assistant if i < count else "?"}) for i, d, s in rows]
        told = " ".join(summary(asked(tmp_path, rows, blanked=True, commonest=ALWAYS_YES).scores))
        assert "Tuning helped" in told
        assert ("Most of this is guessed without the picture: with every picture greyed out" in told) == most
        assert f"exact match is {count}.0\u00a0%" in told


def test_captions_and_questions_are_scored_apart(tmp_path):
    questions, captions = yes_no(100, lambda i: i % 50 < 27), captioned(100)
    together = asked(tmp_path, questions + captions, commonest=ALWAYS_YES)
    alone = {"answers": asked(tmp_path, questions, commonest=ALWAYS_YES), "captions": asked(tmp_path, captions)}
    assert list(together.scores.tasks) == ["captions", "answers"]
    for task, evaluation in alone.items():
        ours, own = together.scores.tasks[task], evaluation.scores.tasks[task]
        for who in ("base", "tuned"):
            assert ours.scores[who] == own.scores[who]
            assert ours.intervals[who] == own.intervals[who]
        assert ours.gains["base"] == own.gains["base"]
    first, *others = summary(together.scores)
    assert first.startswith("Captions: tuning helped: on 100 held-out images, CIDEr-D rose from")
    (of_questions,) = [line for line in others if line.startswith("Questions: ")]
    assert of_questions.startswith("Questions: no better than guessing without a look at the picture")
    page = Page(write_report(tmp_path, together, title="both"))
    assert "100 images, 100 captions." in page.text
    assert "100 images, 100 questions." in page.text
    assert Scores.from_json(json.loads(json.dumps(together.scores.to_json()))) == together.scores
    together.write(tmp_path / "out")
    read = Evaluation.read(tmp_path / "out")
    assert read.ranks("tuned") == together.ranks("tuned")
    captions_alone = cider_d([row[2]["tuned"] for row in captions], [[row[1].turns[-1].assistant] for row in captions])
    assert [rank[0] for rank, row in zip(read.ranks("tuned"), read.answered, strict=True) if len(rank) == 1] == (
        captions_alone
    )


def test_no_length_turns_captions_into_questions(tmp_path):
    short = [(i, replace(d, turns=(Turn(d.turns[0].user, f"thing {i}"),)), s) for i, d, s in captioned(30)]
    long = yes_no(30, lambda i: True)
    long = [(i, replace(d, turns=(Turn(d.turns[0].user, f"in the street of number {i}"),)), s) for i, d, s in long]
    for rows, task, first in ((short, "captions", "cider_d"), (long, "answers", "exact_match")):
        (of_task,) = asked(tmp_path, rows).scores.tasks.items()
        assert (of_task[0], next(iter(of_task[1].metrics))) == (task, first)
        assert ("bleu_4" in of_task[1].metrics) == (task == "captions" and of_task[1].reference_words >= 4)
    (of_task,) = asked(tmp_path, captioned(30)).scores.tasks.values()
    assert "bleu_4" in of_task.metrics


def test_captions_are_told_from_questions_in_every_format(tmp_path):
    def tasks(folder, **how):
        dialogues = [d for e in read_dataset(folder, **how).examples for d in e.dialogues]
        return {(d.turns[-1].user, d.caption) for d in dialogues}

    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("It.")
    assert tasks(tmp_path, prompt="Say it.") == {("Say it.", True)}
    (tmp_path / "0.txt").unlink()
    row = {"image": "0.png", "question": "What?", "answer": "It.", "caption": "All of it."}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    assert tasks(tmp_path / "x.jsonl", prompt="Say it.") == {("What?", None), ("Say it.", True)}
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "In short?", "caption": "It."}) + "\n")
    assert tasks(tmp_path / "x.jsonl", prompt="Say it.") == {("In short?", True)}
    assert {caption for _, caption in tasks(ROOT / "data/emoji_scenes", prompt="Say it.")} == {True}
    for name in ("cat", "dog"):  # right or wrong, though the instruction for captions asks for it
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / name / "0.png")
    (dialogue, _) = [d for e in read_dataset(tmp_path / "classes", prompt="Say it.").examples for d in e.dialogues]
    assert task_of(dialogue, ["cat"], "Say it.") == "answers"
    assert task_of(replace(dialogue, caption=None), ["cat"], "Say it.") == "captions"
    rows = [(i, Dialogue((Turn("Say it.", "It."),)), {"base": "a", "tuned": "b", "one_word": "c"}) for i in range(3)]
    assert list(asked(tmp_path, rows, prompt="Say it.").scores.tasks) == ["captions"]  # messages, say, with the prompt
    assert list(asked(tmp_path, rows).scores.tasks) == ["answers"]


def test_one_word_is_asked_for_where_answers_are_short_and_nobody_asks_yet(tmp_path):
    already = yes_no(2, lambda i: True, question="Is it {}? Answer in one word.")
    rows = [*captioned(2), *yes_no(2, lambda i: True), *already]
    model = Told({(n, d.turns[-1].user): said for n, d, said in rows})
    examples = [
        Example(str(n), (ImageRef(tmp_path / f"{n}.png", f"{n}.png"),), tuple(d for m, d, _ in rows if m == n), "x")
        for n in range(2)
    ]
    counted = []
    evaluation = evaluate(model, examples, progress=lambda done, total: counted.append((done, total)))
    wanted = [question for who, question in model.asked if who == "one_word"]
    assert wanted == [f"Is it {i}?\n{ONE_WORD}" for i in range(2)]
    assert counted[-1] == (16, 16)
    told = {(row.question, row.one_word) for row in evaluation.answered}
    assert ("Describe this image.", None) in told
    assert ("Is it 1? Answer in one word.", "It may be so.") in told  # what the base said to just that
    assert ("Is it 1?", "no") in told


def test_the_commonest_answer_is_that_of_the_question_else_of_its_type_else_of_all(tmp_path):
    def example(question, answer, kind=None, image=True, **more):
        images = (ImageRef(tmp_path / "0.png", "0.png"),) if image else ()
        return Example("0", images, (Dialogue((Turn(question, answer),), kind, **more),), "x")

    often = [example("What colour?", "red")] * (OFTEN - 1)
    examples = [
        *often, example("What colour?", "blue"), *[example("Is it?", "yes", "yes/no")] * 3,
        *[example(f"Where {i}?", "here") for i in range(20)], *[example("Go on.", "text", image=False)] * 99,
        example("Say it.", "A cat.", caption=True),
    ]  # fmt: skip
    commonest = Commonest.of(examples, "Describe this image.", "training")
    assert commonest.guess("answers", None, "What colour?") == "red"
    assert commonest.guess("answers", "yes/no", "Is it not?") == "yes"
    assert commonest.guess("answers", "other", "Who?") == commonest.guess("answers", None, "Who?") == "here"
    assert commonest.guess("captions", None, "Say it.") == "A cat."
    assert commonest.guess("texts", None, "Why?") is None
    once = Commonest.of([*often, *examples[OFTEN:]], "Describe this image.", "training")
    assert once.of_question == {}  # asked once too few
    commonest.write(tmp_path)
    assert Commonest.read(tmp_path) == commonest
    assert Commonest.read(tmp_path / "none") is None
    (tmp_path / "commonest.json").write_text("{")
    with pytest.raises(DataError, match=r"commonest\.json: cannot be read"):
        Commonest.read(tmp_path)


def test_a_type_that_is_no_better_than_its_commonest_answer_is_named(tmp_path):
    colours = [
        (i, Dialogue((Turn("Its colour?", f"colour {i % 9}"),), "colour"), dict.fromkeys(("base", "one_word"), "?"))
        for i in range(100)
    ]
    colours = [(i, d, said | {"tuned": d.turns[-1].assistant}) for i, d, said in colours]
    rows = [*yes_no(100, lambda i: i % 50 < 27, kind="yes/no"), *colours]
    evaluation = asked(tmp_path, rows)
    told = [line.replace("\u00a0", " ") for line in summary(evaluation.scores)]
    assert told[0].startswith("Tuning helped: ")
    assert told[-1] == (
        'No better than the commonest answer of their type are: "yes/no" (100 answers), 54.0 % against 56.0 %.'
    )
    types = evaluation.scores.tasks["answers"].types
    assert types["colour"].scores["tuned"]["exact_match"] == 1.0
    assert types["yes/no"].gains["commonest"].gain == pytest.approx(-0.02)


def test_an_answer_in_a_sentence_does_no_harm():
    assert quoted("a\x1b[2J\n b\u202e") == '"a [2J b"'
    assert len(quoted("word " * 99)) == 42
    assert quoted("half \ud83d") == '"half"'


def test_values_are_no_numbers_where_there_is_no_answer(tmp_path):
    evaluation = asked(tmp_path, [*captioned(2), *yes_no(2, lambda i: True)])
    of = {row.task: line for row, line in zip(evaluation.answered, evaluation.values["one_word"]["anls"], strict=True)}
    assert math.isnan(of["captions"])
    assert not math.isnan(of["answers"])


def labelled(mistakes: dict[tuple[str, str], int], right: int = 30) -> list:
    """Answers to one question: ``right`` ones, and so many of each mistake of a reference and an answer."""
    pairs = [("fox", "fox")] * right + [pair for pair, times in mistakes.items() for _ in range(times)]
    said = {"base": "?", "one_word": "?", "blanked": "?"}
    return [
        (i, Dialogue((Turn("What is it?", reference),)), said | {"tuned": answer})
        for i, (reference, answer) in enumerate(pairs)
    ]


def test_what_is_still_wrong_is_shown_the_commonest_mistake_first(tmp_path):
    mistakes = {("owl", "cat"): 2, ("frog", "toad"): 5, ("owl", "hawk"): 1}
    evaluation = asked(tmp_path, labelled(mistakes))
    assert evaluation.mistakes() == mistakes
    said = [(row.references[0], row.tuned) for row in (evaluation.answered[i] for i in evaluation.still_wrong())]
    each = [("frog", "toad"), ("owl", "cat"), ("owl", "hawk")]
    assert said == [*each, *each[:2], *each[:1] * 3]
    page = Page(write_report(tmp_path, evaluation, title="animals"))
    assert "What was taken for what, of 8 wrong answers" in page.text
    assert "The data says Tuned says Times frog toad 5 owl cat 2 owl hawk 1" in page.text
    wrong = page.text[page.text.rindex("Times ") :]
    cards = [wrong.index(f"Tuned {name} Base") for name in ("toad", "cat", "hawk")]
    assert cards == sorted(cards)  # one of each mistake before the seconds
    assert wrong.index("Tuned toad", cards[0] + 1) > cards[-1]
    whole = asked(tmp_path, labelled({}))
    assert "Still wrong" not in Page(write_report(tmp_path, whole, title="animals")).text


def test_of_captions_the_lowest_are_shown_and_none_twice(tmp_path):
    rows = captioned(30)
    same = [(i, d, said | {"tuned": "A photo of a thing."} if i % 3 else said) for i, d, said in rows]
    evaluation = asked(tmp_path, same)
    wrong = evaluation.still_wrong()
    ranks = evaluation.ranks("tuned")
    assert {i for i in range(30) if i % 3} == set(wrong)
    assert [ranks[i] for i in wrong] == sorted(ranks[i] for i in wrong)
    assert evaluation.mistakes() == {}
    page = Page(write_report(tmp_path, evaluation, title="captions"))
    assert "taken for what" not in page.text
    assert page.text.count("A photo of a thing.") <= 1  # not again and again
    for i in range(0, 30, 3):
        assert f"A photo of thing {i} ." in page.text.replace(".", " .")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. red fox", "B"), ("**B**", "B"), ("B) cat", "B"),
        ("red fox", "B"), ("Red fox.", "B"), ("It is a red fox, I think.", "B"), ("The answer is B.", "B"),
        ("Option (C)", "C"), ("Answer: A", "A"), ("A cat", "A"), ("A red fox", "B"), ("An answer", None), ("D", None),
        ("a cat or an owl", None), ("", None), ("The answer is Belgium", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(answer, letter):
    assert chosen(answer, ["cat", "red fox", "owl"]) == letter


def test_multiple_choice_is_scored_by_letter_and_by_text(tmp_path):
    options = ("cat", "red fox", "owl")
    rows = []
    for i in range(40):
        letter = "ABC"[i % 3]
        dialogue = Dialogue((Turn(f"Which is {i}?", letter),), choices=options)
        wrong = "ABC"[(i + 1) % 3]
        rows.append((i, dialogue, {"base": f"It is a {options[i % 3]}.", "tuned": letter if i % 10 else wrong}))
    evaluation = asked(tmp_path, rows)
    (task, of_task), *more = evaluation.scores.tasks.items()
    assert (task, more, list(of_task.metrics)) == ("choices", [], ["option", "letter"])
    assert of_task.scores["base"] | {"option": 1.0, "letter": 0.0} == of_task.scores["base"]
    assert of_task.scores["tuned"]["option"] == of_task.scores["tuned"]["letter"] == 0.9
    assert of_task.scores["commonest"]["option"] == pytest.approx(14 / 40)  # always A
    assert "one_word" not in of_task.scores  # the letter is asked for already
    assert summary(evaluation.scores)[0].startswith("Tuning did harm: on 40 held-out images, right option fell from")
    assert evaluation.mistakes() == {("A. cat", "B. red fox"): 2, ("B. red fox", "C. owl"): 1, ("C. owl", "A. cat"): 1}
    evaluation.write(tmp_path / "out")
    read = Evaluation.read(tmp_path / "out")
    assert (read.ranks("tuned"), read.mistakes()) == (evaluation.ranks("tuned"), evaluation.mistakes())
    assert "Right option" in Page(write_report(tmp_path, evaluation, title="choices")).text


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ('{"name": "Jo Doe", "total": 5, "items": [{"n": "tea"}, {"n": "milk"}]}', (1, 1, 1, 1, 0, 0)),
        ('```json\n{"total": 5.0, "items": [{"n": "TEA"}, {"n": "milk"}], "name": "jo doe"}\n```', (1, 1, 1, 1, 0, 0)),
        (
            '{"name": "Jo Dee", "total": 5, "items": [{"n": "tea"}, {"n": "milk"}]}',
            (1, 0, 3 / 4, (3 + 5 / 6) / 4, 0, 0),
        ),
        ('{"name": "Jo Doe", "total": null, "more": ""}', (1, 0, 1 / 4, 1 / 4, 1 / 2, 1 / 3)),
        ("[" * 990 + "0" + "]" * 990, (0, 0, 0, 0, 1, 0)),  # nested too deep
        ('{"name": "Jo Doe"', (0, 0, 0, 0, 1, 0)),
        ('"Jo Doe"', (0, 0, 0, 0, 1, 0)),
        ("{}", (1, 0, 0, 0, 1, 1)),
    ],
)
def test_json_is_compared_field_by_field(answer, scores):
    reference = '{"name": "Jo Doe", "total": 5, "items": [{"n": "tea"}, {"n": "milk"}]}'
    assert compared(answer, [reference]) == pytest.approx(scores)
    assert compared(answer, ['{"else": 1}', reference]) == pytest.approx(scores)


def test_answers_in_json_have_scores_and_fields_of_their_own(tmp_path):
    rows = []
    for i in range(40):
        reference = json.dumps({"name": f"shop {i}", "items": [{"n": "tea"}, {"n": f"milk {i}"}]})
        tuned = reference if i % 4 else reference.replace("shop", "stop").replace('"n": "tea"', '"m": "tea"')
        said = {"base": f"The shop is {i}.", "tuned": tuned}
        rows.append((i, Dialogue((Turn("Read it.", reference),), caption=i % 2 == 0), said))
    evaluation = asked(tmp_path, rows)
    (task, of_task), *more = evaluation.scores.tasks.items()
    assert (task, more) == ("json", [])
    tuned = of_task.scores["tuned"]
    assert tuned["json_parses"] == 1.0
    assert (tuned["json_fields"], tuned["json_same"]) == pytest.approx((30 / 40 + 10 / 40 / 3, 30 / 40))
    assert (tuned["json_missing"], tuned["json_extra"]) == pytest.approx((10 / 40 / 3, 10 / 40 / 3))
    assert of_task.scores["base"]["json_parses"] == 0.0
    assert {path: row.answers for path, row in of_task.fields.items()} == {"name": 40, "items[].n": 80}
    assert of_task.fields["name"].scores["tuned"] == pytest.approx(
        {"json_fields": 0.75, "json_anls": 39 / 40}, abs=0.02
    )
    assert of_task.fields["items[].n"].scores["tuned"]["json_fields"] == 70 / 80
    assert summary(evaluation.scores)[0].startswith("Tuning helped: on 40 held-out images, fields right rose from 0.0")
    rows_of = {row[0].value: row for row in score_table(of_task).rows}
    assert (rows_of["Is JSON"][-1].verdict, rows_of["Fields missing"][-1].verdict) == ("good", "good")
    page = Page(write_report(tmp_path, evaluation, title="json")).text
    assert "Fields right by name" in page
    assert "items[].n 80" in page
    assert Scores.from_json(json.loads(json.dumps(evaluation.scores.to_json()))) == evaluation.scores
    evaluation.write(tmp_path / "out")
    assert Evaluation.read(tmp_path / "out").ranks("tuned") == evaluation.ranks("tuned")


def test_two_adapters_beside_each_other_are_told_apart_only_beyond_chance(tmp_path):
    def beside(theirs, count=100, broken=()):
        rows = yes_no(count, lambda i: i % 10 < 9)
        evaluation = asked(tmp_path, rows)
        said = {
            (i, d.turns[-1].user): said | {"tuned": d.turns[-1].assistant if theirs(i) else "?"} for i, d, said in rows
        }
        model = Told(said)
        answer = model.respond
        model.respond = lambda asked, **how: [
            DataError("gone") if int(images[0].name[:-4]) in broken else answer([(images, requests)], **how)[0]
            for images, requests in asked
        ]
        examples = [
            Example(row.example, row.images, (d,), "x")
            for row, (_, d, _) in zip(evaluation.answered, rows, strict=True)
        ]
        return against(evaluation, model, examples)

    def told(scores):
        (sentence,) = versus(scores, "new", "old")
        return sentence.replace("\u00a0", " ")

    better = told(beside(lambda i: i % 10 < 5))
    assert better.startswith("new is better than old: on 100 held-out images, exact match 90.0 % against 50.0 %")
    assert "(difference +40.0 points; 95 % interval " in better
    assert told(beside(lambda i: True)).startswith("new is worse than old: ")
    same = told(beside(lambda i: i not in (3, 13, 23) if i % 10 < 9 else i in (9, 19)))
    assert same.startswith("No difference between new and old that chance could not explain: ")
    assert told(beside(lambda i: False, count=10)).startswith("Too few images to tell new from old: ")
    # Of what one of them could not answer nothing is compared, and nothing is shifted.
    some = beside(lambda i: i % 10 < 9, broken=(0, 7))
    assert (some.answers, some.gain["exact_match"].gain) == (98, 0.0)
    table = tables_as_text(some, columns_of("new", "old"))
    assert table.split("\n")[0].split() == ["old", "new", "Difference"]
    with pytest.raises(DataError, match="None of the 10 examples"):
        beside(lambda i: True, count=10, broken=range(10))
