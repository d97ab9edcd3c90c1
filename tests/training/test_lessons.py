"""Numbers of tokens stand for the tokens, which are made when a step asks for them and not before."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import VISION, picture
from tests.training.test_train import config
from vlm_lora.data.example import Dialogue, Example, Turn
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded
from vlm_lora.model.preprocess import load_preprocessor
from vlm_lora.training.batches import Loader
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.prepare import SplitData, count_tokens

GRIDS = torch.tensor([[1, 8, 8], [1, 4, 12]])
TALKS = (
    [Dialogue((Turn("Look.", "A red cat."),)), Dialogue((Turn("Look.", "A red dog sits."),))],  # images in the prefix
    [Dialogue((Turn("Look.", "A cat."),)), Dialogue((Turn("Look.", "A cat."),), system="Be terse.")],  # in branches
    [Dialogue((Turn("One, two.", "A cat.", images=(5,)), Turn("Then?", "A dog.", images=(0,), weight=0.0)))],
    [Dialogue((Turn("Hm?", "Yes."), Turn("Sure?", "No.", weight=2.0), Turn("So?", "Perhaps.")))],
)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("vectors", [0, 7])
def test_sizes_are_those_of_the_tokens(checkpoints, family, vectors):
    encoder = Encoder(load_preprocessor(str(checkpoints[family])), vectors)
    for dialogues in TALKS:
        sizes, encoded = encoder.sizes(dialogues, GRIDS), encoder.encode(dialogues, GRIDS)
        assert (sizes.prefix, sizes.images_in_prefix) == (len(encoded.prefix_ids), encoded.images_in_prefix)
        assert sizes.branches == [
            (len(b.input_ids), int((b.labels != IGNORE_INDEX).sum()), b.num_images) for b in encoded.branches
        ]
        lesson = Lesson.of(Example("x", (), tuple(dialogues), "x"), sizes)
        assert lesson.num_tokens == encoded.num_tokens


@pytest.fixture
def counted(checkpoints, tmp_path):
    """Forty pictures with one to four captions each, counted as for a run; and a loader of their tokens."""
    rows = []
    for i in range(40):
        picture(i, (32 + 16 * (i % 3), 32)).save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": f"Number {i}, said {'again ' * n}"} for n in range(1 + i % 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(checkpoints, tmp_path / "train.jsonl", tmp_path / "run")
    examples = read_dataset(tmp_path / "train.jsonl", prompt=settings.prompt).examples
    features = FeatureCache(load_backbone(settings.model), None)
    data = SplitData(list(examples), [], (), "", "", None)
    gc.collect()
    before = tokens_alive()
    encoder = Encoder(features.backbone)
    lessons = count_tokens(settings, data, encoder, lambda *_: None).train
    gc.collect()
    assert tokens_alive() - before <= 0, "tokens are kept before a step asks for them"
    assert encoder._ahead == {}
    return features, examples, lessons


def tokens_alive() -> int:
    return sum(isinstance(each, Encoded | Branch | Lesson | torch.Tensor) for each in gc.get_objects())


def test_no_tokens_are_kept_and_each_process_makes_those_of_its_share(counted, monkeypatch):
    features, examples, lessons = counted
    assert [len(lesson.branches) for lesson in lessons] == [1, 2, 3, 4] * 10
    assert lessons.num_tokens.tolist() == [lesson.num_tokens for lesson in lessons]
    assert [each.example for each in lessons[::-3]] == list(examples)[::-3]
    assert lessons.take([3, 3])[1].example == examples[3]
    made = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, *given: made.append(1) or encode(self, *given))
    shares = []
    for index in range(2):
        place = SimpleNamespace(index=index, count=2, sharded=False)
        fetched = Loader(features.backbone, features, place).fetch(lessons[:10], 4096)
        shares.append(sum(batch.num_labels for batch in fetched))
    assert len(made) == 10, "a process makes tokens of rows that are another's"
    assert sum(shares) == sum(lesson.num_labels for lesson in lessons[:10])


def test_a_text_that_changes_after_it_is_counted_is_told(counted):
    features, examples, lessons = counted
    encoded = Encoder(features.backbone).encode(examples[1].dialogues, features.grids(examples[1]))
    lesson = lessons[1].with_branches([1])
    assert len(lesson.taken_from(encoded).branches) == 1
    for other in (lessons[2], lessons[5]):
        with pytest.raises(DataError, match=r"train\.jsonl:\d+: has \d+ tokens, and had \d+ when they were counted"):
            other.taken_from(encoded)
