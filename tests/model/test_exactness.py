"""Everything fast equals `naive`, in loss and in every gradient, from non-zero adapters; and would notice if not."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import picture
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Dialogue, Example, ImageRef, Turn
from vlm_lora.model import packing, recurrent
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.packing import pack, pack_apart, padded_tokens
from vlm_lora.training import step
from vlm_lora.training.batches import EncodedExample, Loader, MicroBatch
from vlm_lora.training.checkpoint import Progress
from vlm_lora.training.step import loss_sum

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
ALONE = SimpleNamespace(index=0, count=1, sharded=False, highest=int)
# Rotary angles are float32 upstream, whatever the weights are; measured: 6e-8. Of `in_double`: 3e-14.
FP64 = dict.fromkeys(FAMILIES, 2e-6) | {"qwen3_5": 1e-12}


def one_turn(question: str, answer: str) -> Dialogue:
    return Dialogue((Turn(question, answer),))


def make_example(tmp_path, name: str, sizes, dialogues) -> Example:
    images = []
    for i, size in enumerate(sizes):
        path = tmp_path / f"{name}-{i}.png"
        picture(hash((len(name), i)) % 1000, size).save(path)
        images.append(ImageRef(path=path, name=path.name))
    return Example(name, tuple(images), tuple(dialogues), f"{name}:1")


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    """Ragged images, one to ten branches, several turns, several images, and none."""
    caption = [one_turn("Describe this image.", f"Caption number {k}, with {'many ' * k}words.") for k in range(5)]
    questions = [one_turn(f"Is there a thing of kind {k}?", ["yes", "no", "a little of it"][k % 3]) for k in range(10)]
    talk = Dialogue((Turn("What is this?", "a blob"), Turn("And its colour?", "mostly blue"), Turn("Sure?", "yes")))
    told = Turn("Is it a blob?", "surely it is", weight=0.0)
    later = Turn("And, compared, which?", "the second of them", images=(4, 21), weight=2.5)
    between = Dialogue((Turn("Compare with it.", "no", images=(8, 16)), Turn("Sure?", "yes indeed", weight=0.25)))
    asked = [replace(one_turn(f"Which of {k}?", "the " * k + "last"), system="Be terse.") for k in range(1, 4)]
    return [
        make_example(tmp_path, "captions", [(64, 64)], caption),
        make_example(tmp_path, "questions", [(96, 48)], questions),
        make_example(tmp_path, "talk", [(48, 80)], [talk, one_turn("Name it.", "blob")]),
        make_example(tmp_path, "two images", [(64, 32), (32, 64)], [one_turn("What differs?", "the shape")] * 2),
        make_example(tmp_path, "alone", [(80, 80)], [one_turn("Hm?", "yes")]),
        make_example(tmp_path, "text", [], [one_turn("What is two and two?", "four"), one_turn("And three?", "six")]),
        # What a system message says, or images after what differs, is no part of the prefix of all
        make_example(tmp_path, "system", [(48, 64)], [*asked, replace(asked[0], system="")]),
        make_example(tmp_path, "terse", [(64, 48)], asked),
        make_example(tmp_path, "between", [(64, 32), (32, 64)], [between, replace(between, turns=(told, later))]),
        make_example(tmp_path, "weighed", [(32, 64)], [Dialogue((told, replace(later, images=()))), *asked]),
    ]


@contextmanager
def in_double(family: str) -> Iterator[None]:
    """Qwen3.5's modelling without its casts to float32, which hide what is smaller than their noise; the others' are at
    rotary angles alone."""
    import transformers  # here, as the module is another one once it is loaded
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modelling

    if family != "qwen3_5":
        yield
        return
    source = inspect.getsource(modelling)
    for cast in (".float()", "torch.float32", "dtype=torch.float"):
        assert cast in source
        source = source.replace(cast, cast.replace("float32", "double").replace("float", "double"))
    for part in ("vision", "text"):  # and not by their names, which are the stock classes'
        made = f"AutoModel.from_config(config.{part}_config)"
        assert made in source
        source = source.replace(made, f"Qwen3_5{part.title()}Model._from_config(config.{part}_config)")
    precise = ModuleType(modelling.__name__)
    precise.__dict__.update(__package__=modelling.__package__, __file__=modelling.__file__)
    exec(compile(source, modelling.__file__, "exec"), precise.__dict__)
    name = "Qwen3_5ForConditionalGeneration"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, name, getattr(precise, name))
        yield


def load_in(checkpoints, family: str, dtype: torch.dtype):
    with in_double(family) if dtype == torch.float64 else nullcontext():
        backbone = load_backbone(str(checkpoints[family]), dtype="float32")
    backbone.model.to(dtype)
    return backbone


def load(checkpoints, family: str, dtype=torch.float64):
    backbone = load_in(checkpoints, family, dtype)
    adapter = attach_adapter(backbone, TrainConfig(data="none", rank=4, seed=1))
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data = torch.randn_like(parameter.data).to(dtype) * 0.1
    backbone.model.train()
    return backbone, adapter


def gradients(adapter, loss) -> dict[str, torch.Tensor]:
    adapter.backbone.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


def naive(backbone, examples) -> torch.Tensor:
    """The plain way: a row for each answer, pixels through the tower each time, full logits, stock positions and mask.

    Text is rendered and tokenised in one piece by the processor, and the answers found by their place in it.
    """
    total, count = 0.0, 0
    processor, tokenizer = backbone.processor, backbone.tokenizer
    thinks = backbone.model.config.model_type == "qwen3_5"
    opening = tokenizer("<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * thinks)["input_ids"]
    for example in examples:
        for dialogue, end in conversations(example, last_alone=thinks):
            turns = dialogue.turns[:end]
            messages = messages_of(dialogue, len(example.images))[: 2 * end + bool(dialogue.system)]
            text = processor.apply_chat_template(messages, tokenize=False)
            shown = sum(part["type"] == "image" for m in messages for part in m["content"] if isinstance(part, dict))
            pictures = [picture_of(image) for image in example.images[:shown]] or None
            inputs = processor(text=[text], images=pictures, return_tensors="pt").to(backbone.device)
            inputs.pop("token_type_ids", None)
            ids = inputs["input_ids"][0].tolist()
            logits = backbone.model(**inputs, use_cache=False).logits[0]
            start = 0
            for turn in turns[-1:] if thinks else turns:
                answer = tokenizer(turn.assistant + "<|im_end|>")["input_ids"]
                pattern = opening + answer
                at = next(i for i in range(start, len(ids)) if ids[i : i + len(pattern)] == pattern)
                start = at + len(opening)
                predicted = logits[start - 1 : start - 1 + len(answer)]
                loss = F.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
                total = total + turn.weight * loss
                count += len(answer) if turn.weight else 0
    return total / count


def conversations(example: Example, last_alone: bool) -> Iterator[tuple[Dialogue, int]]:
    """What is learnt from: dialogues, and up to which turn; all beginnings where what is learnt must be the last."""
    for dialogue in example.dialogues:
        for end in range(1, len(dialogue.turns)) if last_alone else ():
            yield dialogue, end
        yield dialogue, len(dialogue.turns)


def messages_of(dialogue: Dialogue, num_images: int) -> list[dict]:
    """What a program would send to a server, text and images in parts."""
    in_front = [{"type": "image"}] * (0 if any(turn.images for turn in dialogue.turns) else num_images)
    messages = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    for turn in dialogue.turns:
        content, in_front = in_front, []
        for number, piece in enumerate(turn.pieces):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.assistant}]})
    return messages


def picture_of(image: ImageRef):
    from vlm_lora.data.images import load_image

    return load_image(image)


def lessons_of(backbone, features, examples) -> list[EncodedExample]:
    encoder = Encoder(backbone)
    lessons = []
    for example in examples:
        grids = [entry.grid_thw for entry in features.get(example.images)]
        grid = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
        lessons.append(EncodedExample(example, encoder.encode(example.dialogues, grid)))
    return lessons


def make_batches(backbone, features, lessons, max_tokens: int) -> list[MicroBatch]:
    loader = Loader(backbone, features, ALONE)
    return [loader.place(fetched) for fetched in loader.fetch(lessons, max_tokens)]


def fast(backbone, examples, max_tokens: int, cache=None) -> torch.Tensor:
    features = FeatureCache(backbone, cache)
    batches = make_batches(backbone, features, lessons_of(backbone, features, examples), max_tokens)
    return sum(loss_sum(backbone, batch) for batch in batches) / sum(batch.num_labels for batch in batches)


def off_by(ours, reference) -> float:
    """The largest error of any gradient."""
    return max(float((ours[name] - expected).norm() / expected.norm()) for name, expected in reference.items())


def assert_equal(ours, reference, tolerance: float) -> None:
    for name, expected in reference.items():
        error = off_by(ours, {name: expected})
        assert error < tolerance, f"{name}: {error:.2e}"


def assert_checkpointing_changes_nothing(adapter, examples, tolerance: float) -> None:
    backbone, runs = adapter.backbone, []
    backbone.model.train()
    backbone.language_model.layers[1].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    wanted = fast(backbone, examples, 4096)
    expected, before = gradients(adapter, wanted), len(runs)
    backbone.checkpoint_layers()
    loss = fast(backbone, examples, 4096)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=0)
    assert_equal(gradients(adapter, loss), expected, tolerance)
    assert len(runs) == 3 * before, "nothing was computed again"


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_and_cached_features_equal_naive(checkpoints, examples, tmp_path, family):
    backbone, adapter = load(checkpoints, family)
    reference = naive(backbone, examples)
    expected = gradients(adapter, reference)
    # max_tokens 90 deals an example's branches out over several rows; the second pass reads features from disk.
    for max_tokens, cache in ((4096, tmp_path / "cache"), (90, tmp_path / "cache"), (700, None)):
        loss = fast(backbone, examples, max_tokens, cache)
        torch.testing.assert_close(loss, reference, rtol=FP64[family], atol=0)
        assert_equal(gradients(adapter, loss), expected, FP64[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_at_its_noise_floor(checkpoints, examples, family):
    backbone, adapter = load(checkpoints, family, torch.float32)
    expected = gradients(adapter, naive(backbone, examples))
    assert_equal(gradients(adapter, fast(backbone, examples, 4096)), expected, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_logits_equal_whole_ones(checkpoints, examples, monkeypatch, chunk, family):
    backbone, adapter = load(checkpoints, family)
    expected = gradients(adapter, fast(backbone, examples, 4096))
    monkeypatch.setattr(step, "LOGITS_AT_ONCE", chunk)
    assert_equal(gradients(adapter, fast(backbone, examples, 4096)), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_in_one_row_equal_naive(checkpoints, examples, family):
    backbone, adapter = load(checkpoints, family)
    expected = gradients(adapter, naive(backbone, examples))
    assert_equal(gradients(adapter, _one_row(backbone, examples)), expected, FP64[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_faults_would_be_noticed(checkpoints, examples, family):
    """Negative controls: each silent trap of packing moves the gradients far beyond the tolerance."""
    backbone, adapter = load(checkpoints, family)
    expected = gradients(adapter, naive(backbone, examples))
    for fault in ("mask", "positions", "label", "weights"):
        assert off_by(gradients(adapter, _one_row(backbone, examples, fault)), expected) > 1e-3, fault
    for fault in ("padding", "siblings", "positions"):
        assert off_by(gradients(adapter, _rows_apart(backbone, examples, fault)), expected) > 1e-3, fault


@pytest.mark.parametrize(
    "fault", [None, "empty", "columns", "memory", "owners", "detached", "right", "unmasked", "stock", "one by one"]
)
def test_a_state_is_forked_where_a_prefix_ends(checkpoints, examples, monkeypatch, fault):
    """Of Qwen3.5's linear attention, which no mask tells where a sequence begins; and each fault would be noticed."""
    backbone, adapter = load(checkpoints, "qwen3_5")
    reference = naive(backbone, examples)
    expected = gradients(adapter, reference)
    assert sum(".linear_attn." in name for name in expected) == 3 * 5 * 2
    state, tolerance = recurrent._state_class(), FP64["qwen3_5"]
    fork, tables = state.of, recurrent.find_forks

    def faulty_fork(self, owners):
        other = fork(self, owners.roll(1) if fault == "owners" else owners)
        columns, memory = other.conv_states, other.recurrent_states
        columns[0] = columns[0] * (fault not in ("empty", "columns"))
        memory[0] = memory[0] * (fault not in ("empty", "memory"))
        if fault == "detached":
            columns[0], memory[0] = columns[0].detach(), memory[0].detach()
        return other

    def faulty_tables(prefixes, *rest):
        made = tables(prefixes, *rest)
        if fault == "right":  # prefixes padded on that side, under the mask that upstream has for padding
            made.prefixes[:], made.mask[:] = made.prefixes.flip(1), made.mask.flip(1)
            for row, places in enumerate(prefixes):
                made.prefixes[row, : len(places)] = torch.arange(places.start, places.stop)
                made.back.view(-1)[places.start : places.stop] = row * made.mask.shape[1] + torch.arange(len(places))
        return replace(made, mask=torch.ones_like(made.mask)) if fault == "unmasked" else made

    monkeypatch.setattr(state, "of", faulty_fork)
    monkeypatch.setattr(packing, "find_forks", faulty_tables)
    if fault == "stock":
        backbone.family = replace(backbone.family, recurrent=False)
    if fault == "one by one":  # not a fault
        monkeypatch.setattr(recurrent, "_of_like_length", lambda branches: [[branch] for branch in branches])
    loss = fast(backbone, examples, 4096)
    error = off_by(gradients(adapter, loss), expected)
    if fault in (None, "one by one"):
        torch.testing.assert_close(loss, reference, rtol=tolerance, atol=0)
        assert error < tolerance
    else:
        assert error > 0.1
    assert (abs(loss - reference) < tolerance * reference) == (fault in (None, "one by one", "detached"))


def test_a_packed_row_without_its_forks_is_refused(checkpoints, examples):
    backbone, _ = load(checkpoints, "qwen3_5", torch.float32)
    features = FeatureCache(backbone, None)
    (batch,) = make_batches(backbone, features, lessons_of(backbone, features, examples[:1]), 4096)
    with pytest.raises(ValueError, match="without forks"):
        backbone.forward(batch.input_ids, batch.attention_mask, batch.position_ids, batch.images)


def test_short_branches_are_not_padded_to_a_long_ones_length():
    lengths = [3, 900, 1, 64, 500, 40, 7]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    branches = [(0, range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    forks = recurrent.find_forks([range(0)], branches, (1, sum(lengths)))
    assert sorted(table.shape for table in forks.branches) == [(2, 900), (5, 64)]
    assert recurrent.find_forks([range(3)], [(0, range(3, 4))], (1, 4)).branches[0].tolist() == [[3, 0]]  # never one
    flat = torch.cat([forks.prefixes.flatten(), *(table.flatten() for table in forks.branches)])
    assert torch.equal(flat[forks.back.flatten()], torch.arange(sum(lengths)))


@pytest.mark.parametrize("fault", ["unseen", "swapped"])
def test_the_inner_layers_of_the_tower_are_seen_where_they_belong(checkpoints, examples, monkeypatch, fault):
    """Negative control of Qwen3-VL's DeepStack; above, both are equal."""
    backbone, adapter = load(checkpoints, "qwen3_vl")
    expected = gradients(adapter, naive(backbone, examples))
    forward = backbone.language_model.forward

    @wraps(forward)
    def faulty(*, deepstack_visual_embeds=(), **given):
        shown = deepstack_visual_embeds[::-1] if fault == "swapped" else ()
        return forward(deepstack_visual_embeds=shown, **given)

    monkeypatch.setattr(backbone.language_model, "forward", faulty)
    backbone.model.zero_grad()
    fast(backbone, examples, 4096).backward()
    found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert off_by(found, {name: expected[name] for name in found}) > 1e-3


def learnt(backbone, adapter, examples, max_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients as `accumulate_gradients` leaves them for the optimizer."""
    features = FeatureCache(backbone, None)
    adapter.backbone.model.zero_grad()
    loader, lessons = Loader(backbone, features, ALONE), lessons_of(backbone, features, examples)
    loss = step.accumulate_gradients(loader, lessons, None, 0, Progress(micro_batch_tokens=max_tokens), pytest.fail)
    return loss, {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_naive_however_it_is_cut_up(checkpoints, examples, family, monkeypatch):
    """And would not with another normaliser: each micro-batch's own labels, or all of its tokens."""
    backbone, adapter = load(checkpoints, family)
    reference = naive(backbone, examples)
    expected = gradients(adapter, reference)
    for max_tokens in (4096, 90):
        loss, found = learnt(backbone, adapter, examples, max_tokens)
        torch.testing.assert_close(loss.double(), reference.detach(), rtol=1e-6, atol=0)  # the sum is float32
        assert_equal(found, expected, FP64[family])
    monkeypatch.setattr(step, "count_labels", lambda lessons: sum(each.encoded.num_tokens for each in lessons))
    assert off_by(learnt(backbone, adapter, examples, 90)[1], expected) > 1e-3
    monkeypatch.undo()
    of_rows = step.loss_sum
    monkeypatch.setattr(step, "loss_sum", lambda backbone, batch, *_: of_rows(backbone, batch) / batch.num_labels)
    monkeypatch.setattr(step, "count_labels", lambda lessons: 1)
    assert off_by(learnt(backbone, adapter, examples, 90)[1], expected) > 1e-3


@pytest.mark.parametrize("max_tokens", [4096, 90])
def test_the_held_out_loss_is_the_mean_of_the_labelled_tokens(checkpoints, examples, max_tokens):
    backbone, _ = load(checkpoints, "qwen2_vl")
    features, alone = FeatureCache(backbone, None), SimpleNamespace(**vars(ALONE), add_up=list)
    backbone.model.train()
    found = step.mean_loss(Loader(backbone, features, alone), lessons_of(backbone, features, examples), max_tokens)
    assert found == pytest.approx(naive(backbone, examples).item(), rel=1e-9)
    assert backbone.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_no_device(checkpoints, examples, family):
    """A tensor on the meta device has a shape and no numbers: what a GPU would be waited for raises here."""
    backbone, adapter = load(checkpoints, family, torch.float32)
    features = FeatureCache(backbone, None)
    lessons = lessons_of(backbone, features, examples)
    loader = Loader(backbone, features, ALONE)
    fetched = loader.fetch(lessons, 700)
    assert len(fetched) > 1
    backbone.model.to("meta")
    loss = step.accumulate_gradients(loader, lessons, fetched, 0, Progress(micro_batch_tokens=700), pytest.fail)
    trained = [parameter for _, parameter in adapter.named_parameters()]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    assert all(tensor.is_meta for tensor in (loss, norm, *(parameter.grad for parameter in trained)))
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_step_can_be_fetched_while_the_tower_runs(checkpoints, examples, family):
    backbone, _ = load(checkpoints, family, torch.float32)
    features = FeatureCache(backbone, None)
    lessons, fetched = lessons_of(backbone, features, examples), []

    def fetch(*_) -> None:
        fetched.append(Loader(backbone, features, ALONE).fetch(lessons, 4096))

    backbone.model.model.visual.blocks[0].register_forward_pre_hook(fetch)
    backbone.tower(*backbone.preprocess([picture_of(examples[0].images[0])]))
    assert len(fetched) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_made_while_the_base_computes_is_the_base(checkpoints, examples, family):
    """In the demo somebody chooses another adapter while somebody else is being answered."""
    backbone = load_backbone(str(checkpoints[family]))
    pixels = backbone.preprocess([picture_of(examples[0].images[0])])
    features = FeatureCache(backbone, None)
    (batch,) = make_batches(backbone, features, lessons_of(backbone, features, examples[:1]), 4096)
    twins = []

    def choose(*_) -> None:
        if len(twins) < 2:  # twins have this hook too
            twins.append(backbone.twin(*backbone.pixel_limits))

    with torch.no_grad():
        for busy, compute in (
            (backbone.model.model.visual.blocks[0], lambda: backbone.tower(*pixels)),
            (backbone.language_model.layers[0], lambda: loss_sum(backbone, batch)),
        ):
            hook = busy.register_forward_pre_hook(choose)
            wanted = compute()
            hook.remove()
        assert len(twins) == 2
        for twin in twins:
            assert torch.equal(loss_sum(twin, batch), wanted)
            assert torch.equal(twin.tower(*pixels), backbone.tower(*pixels))


def test_what_goes_to_a_gpu_is_pinned(checkpoints, examples, monkeypatch):
    """From other memory a copy to a GPU waits until that has computed what it was given before."""
    backbone, _ = load(checkpoints, "qwen2_vl", torch.float32)
    features = FeatureCache(backbone, None)
    lessons, pinned = lessons_of(backbone, features, examples), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    (fetched,) = Loader(backbone, features, ALONE).fetch(lessons, 10**6)
    assert pinned == []
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    (fetched,) = Loader(backbone, features, ALONE).fetch(lessons, 10**6)
    large = [fetched.packed.attention_mask, fetched.packed.position_ids, *(each.values for each in fetched.images)]
    assert {tensor.data_ptr() for tensor in large} <= set(pinned)


def _one_row(backbone, examples, fault: str | None = None) -> torch.Tensor:
    """The loss with all examples in one row, under a mask of all tokens by all tokens."""
    features = FeatureCache(backbone, None)
    lessons = lessons_of(backbone, features, examples)
    packed = pack([[lesson.encoded for lesson in lessons]], backbone.pad_token_id)
    length = packed.input_ids.shape[1]
    if fault == "mask":
        packed = replace(packed, attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    if fault == "positions":
        packed = replace(packed, position_ids=torch.arange(length).expand(3, 1, -1))
    if fault == "weights":
        packed = replace(packed, weights=None)
    if fault == "label":
        packed = replace(packed, labels=torch.where(packed.labels >= 0, packed.labels, packed.input_ids))
    batch = _as_batch(packed, features, lessons)
    return loss_sum(backbone, batch) / batch.num_labels


def _as_batch(packed, features, lessons) -> MicroBatch:
    stacked = torch.cat([e.values for lesson in lessons for e in features.get(lesson.images)])
    num_labels = int((packed.labels[:, 1:] >= 0).sum())
    rows = (packed.input_ids, packed.labels, packed.position_ids, packed.attention_mask)
    return MicroBatch(*rows, stacked, num_labels, packed.forks, packed.weights)


def _rows_apart(backbone, examples, fault: str | None = None) -> torch.Tensor:
    """The loss with a row for each example, prefixes and branches in regions of their own."""
    features = FeatureCache(backbone, None)
    lessons = lessons_of(backbone, features, examples)
    packed = pack_apart([lesson.encoded for lesson in lessons], backbone.pad_token_id)
    mask = packed.attention_mask.clone()
    start = packed.input_ids.shape[1] - mask.shape[2]
    if fault == "padding":  # branches see what fills up the shorter prefixes
        mask[..., :start] = True
    if fault == "siblings":  # branches see those before them
        mask[..., start:] = torch.ones(mask.shape[2], mask.shape[2], dtype=torch.bool).tril()
    if fault == "positions":  # branches begin behind the padding
        positions = packed.position_ids.clone()
        positions[:, :, start:] += start
        packed = replace(packed, position_ids=positions)
    batch = _as_batch(replace(packed, attention_mask=mask), features, lessons)
    return loss_sum(backbone, batch) / batch.num_labels


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_branches_apart_equal_naive(checkpoints, examples, family):
    backbone, adapter = load(checkpoints, family)
    expected = gradients(adapter, naive(backbone, examples))
    assert_equal(gradients(adapter, _rows_apart(backbone, examples)), expected, FP64[family])


def test_branches_apart_need_no_mask_of_all_tokens(checkpoints, examples):
    backbone, _ = load(checkpoints, "qwen2_vl")
    encoded = [lesson.encoded for lesson in lessons_of(backbone, FeatureCache(backbone, None), examples)]
    packed = pack_apart(encoded, backbone.pad_token_id)
    prefixes = [len(e.prefix_ids) for e in encoded]
    widest = max(e.num_tokens - prefix for e, prefix in zip(encoded, prefixes, strict=True))
    assert packed.attention_mask.shape == (len(encoded), 1, widest, max(prefixes) + widest)
    assert padded_tokens(encoded) == packed.input_ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_one_answer_is_transformers_own(checkpoints, examples, family):
    """The same tokens and labels through the model's own ``labels=`` argument."""
    backbone, _ = load(checkpoints, family, torch.float32)
    example = replace(examples[0], dialogues=examples[0].dialogues[:1])
    features = FeatureCache(backbone, None)
    (lesson,) = lessons_of(backbone, features, [example])
    (batch,) = make_batches(backbone, features, [lesson], 4096)
    pixel_values, grid = backbone.preprocess([picture_of(example.images[0])])
    theirs = backbone.model(
        input_ids=batch.input_ids,
        labels=batch.labels,
        pixel_values=pixel_values,
        image_grid_thw=grid,
        mm_token_type_ids=(batch.input_ids == backbone.image_token_id).int(),
    ).loss
    torch.testing.assert_close(loss_sum(backbone, batch) / batch.num_labels, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_models_own(checkpoints, examples, family):
    backbone, _ = load(checkpoints, family)
    for lesson in lessons_of(backbone, FeatureCache(backbone, None), examples[:5]):
        ids = lesson.encoded.prefix_ids[None]
        grids = torch.stack([e.grid_thw for e in FeatureCache(backbone, None).get(lesson.example.images)])
        theirs, _ = backbone.model.model.get_rope_index(
            ids, mm_token_type_ids=(ids == backbone.image_token_id).int(), image_grid_thw=grids
        )
        assert torch.equal(lesson.encoded.prefix_positions, theirs[:, 0])
