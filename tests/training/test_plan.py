"""What `vlm-lora plan` predicts, against what the code does: operations, bytes, tensors, steps.

Run: pytest tests/training/test_plan.py
"""

import gc
import json
import random
import statistics
import weakref
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop, sdpa_flop_count

from tests.conftest import copy_checkpoint, picture
from tests.model.test_exactness import ALONE
from tests.model.test_methods import METHODS
from tests.told import Told
from tests.training.test_train import config
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig, cache_folder
from vlm_lora.errors import DataError
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, store_in
from vlm_lora.model.shapes import load_shapes
from vlm_lora.progress import TrainReport
from vlm_lora.training.batches import Loader
from vlm_lora.training.cost import CostModel, _passes, _waited_for, micro_shapes, predict
from vlm_lora.training.devices import ATTAINED, DEVICES, LAUNCH, SMALLEST, Device, price
from vlm_lora.training.estimate import estimate_run
from vlm_lora.training.lessons import Lesson, Lessons
from vlm_lora.training.prepare import read_data
from vlm_lora.training.run import train_adapter as train
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.step import loss_sum
from vlm_lora.training.trace import ATTENTION_OPERATIONS, Kernel, MicroShape, Traced, micro_batch

CPU = torch.device("cpu")
aten = torch.ops.aten
COUNTED = {  # torch's own counts, which it does not know to apply to its CPU kernel
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop(
        g, q, k, v
    ),
}
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


def prepared(checkpoints, photo_folder, tmp_path, family="qwen2_vl", **changes):
    settings = config(checkpoints, photo_folder, tmp_path / "run", **{"model": str(checkpoints[family])} | changes)
    settings = settings.on("cpu")
    backbone = load_backbone(settings.model, dtype=settings.dtype, quantise=settings.method == "qlora")
    adapter = attach_adapter(backbone, settings)
    if settings.gradient_checkpointing:
        backbone.checkpoint_layers()
    backbone.model.train()
    features = FeatureCache(backbone, None)
    examples = read_data(settings, settings.data).examples
    encoder = Encoder(backbone)
    grids = [torch.stack([features.prepare(i) for i in e.images]) for e in examples]
    sizes = [encoder.sizes(e.dialogues, each) for e, each in zip(examples, grids, strict=True)]
    lessons = Lessons.of(examples, enumerate(sizes), {})
    patches = {image: features.patches(image) for lesson in lessons for image in lesson.example.images}
    return settings, backbone, adapter, features, lessons, patches


def shape_of(fetched, branches: int = 0) -> MicroShape:
    rows, width = fetched.packed.input_ids.shape
    prefix = width - fetched.packed.attention_mask.shape[2]
    return MicroShape(
        rows, width, prefix, branches, fetched.num_labels, tuple(int(item.grid_thw.prod()) for item in fetched.images)
    )


def num_branches(lessons) -> int:
    return sum(len(lesson.branches) for lesson in lessons)


def off(predicted: float, real: float) -> float:
    return abs(predicted / real - 1)


CHANGES = [
    {}, {"variant": "rslora", "rank": 8}, {"targets": "projector"}, {"projector_rank": 9},
    {"gradient_checkpointing": True}, {"targets": "language,vision"},
]  # fmt: skip


def counts_grouped_heads() -> bool:
    try:
        return sdpa_flop_count((1, 4, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8)) > 0
    except AssertionError:
        return False


@pytest.mark.skipif(not counts_grouped_heads(), reason="this torch cannot count attention of grouped heads")
@pytest.mark.parametrize(("family", "changes"), [
    pytest.param(family, changes, marks=[pytest.mark.long] * (family != "qwen2_vl" and changes not in CHANGES[::4]))
    for changes in CHANGES for family in FAMILIES
], ids=str)  # fmt: skip
def test_operations_are_those_that_torch_counts(checkpoints, photo_folder, tmp_path, family, changes):
    settings, backbone, _, features, lessons, _ = prepared(checkpoints, photo_folder, tmp_path, family, **changes)
    loader = Loader(backbone, features, ALONE)
    (fetched,) = loader.fetch(lessons[:6], 4096)
    cost = CostModel(settings, torch.float32, "cpu")
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as tower:
        batch = loader.place(fetched)
    through_tower = sum(map(cost.tower_operations, shape_of(fetched).patches))
    if "vision" in settings.lora_targets:
        assert tower.get_total_flops() == 0  # it runs in the step
    else:
        assert off(through_tower, tower.get_total_flops()) < 0.03
        through_tower = 0
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as steps:
        loss_sum(backbone, batch).backward()
    shape = shape_of(fetched, num_branches(lessons[:6]))
    assert off(through_tower + cost.step_operations(shape), steps.get_total_flops()) < 0.03
    exact = 1e-3 if family == "qwen3_5" else 1e-9  # linear attention pads to pieces, of which a sum knows the number
    assert off(cost.step_operations(shape), cost.trace(shape).operations) < exact
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as scoring, torch.no_grad():
        loss_sum(backbone, batch)
    if not through_tower:  # else it is in it too
        assert off(cost.forward_operations(shape), scoring.get_total_flops()) < 0.03
    more = shape._replace(width=shape.width + 30)  # negative control
    assert off(through_tower + cost.step_operations(more), steps.get_total_flops()) > 0.1


@dataclass(eq=False)
class Saved:
    """What autograd keeps, where it can be seen whether it still does."""

    tensor: torch.Tensor


def predicted_and_kept(checkpoints, photo_folder, tmp_path, family, examples=None, **changes) -> tuple[float, int]:
    """Bytes of activations, by the plan and by autograd, behind the forward pass of a step of so many ``examples``."""
    settings, backbone, _, features, lessons, _ = prepared(checkpoints, photo_folder, tmp_path, family, **changes)
    loader = Loader(backbone, features, ALONE)
    (fetched,) = loader.fetch(lessons[:examples], 4096)
    batch = loader.place(fetched)
    held = weakref.WeakSet()  # without what nothing holds any more: DoRA makes a graph that leads nowhere

    def keep(tensor):
        held.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        loss = loss_sum(backbone, batch)
    storages = [saved.tensor.untyped_storage() for saved in held]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert loss.requires_grad  # and so holds all of them
    weights = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    real = sum(size for pointer, size in kept.items() if pointer not in weights)
    cost = CostModel(settings, backbone.dtype, "cpu")
    shape = shape_of(fetched, num_branches(lessons[:examples]))
    return cost.trace(shape).kept + cost.tower_kept(shape.patches), real


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "variant", "dropout", "targets"),
    [
        ("float32", "plain", 0.0, "language,projector"),
        ("bfloat16", "plain", 0.1, "vision,language,projector"),
        ("bfloat16", "dora", 0.1, "language,projector"),
        ("bfloat16", "dora", 0.0, "vision,language,projector"),
    ],
)
def test_activations_are_what_autograd_keeps(
    checkpoints, photo_folder, tmp_path, family, dtype, variant, dropout, targets
):
    changes = {"dtype": dtype, "targets": targets, "variant": variant, "dropout": dropout}
    assert off(*predicted_and_kept(checkpoints, photo_folder, tmp_path, family, **changes)) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_that_is_not_trained_keeps_nothing(checkpoints, photo_folder, tmp_path, family):
    changes = {"targets": "language", "dropout": 0.0}
    assert off(*predicted_and_kept(checkpoints, photo_folder, tmp_path, family, **changes)) < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dora_with_dropout_keeps_weights_unpacked_from_four_bits(checkpoints, photo_folder, tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    changes = {"method": "qlora", "variant": "dora", "dropout": 0.1, "dtype": dtype, "examples": 1}  # so they weigh
    assert off(*predicted_and_kept(checkpoints, photo_folder, tmp_path, "qwen2_vl", **changes)) < 0.03


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].get("method") != "qlora"])
def test_numbers_are_those_of_the_model(checkpoints, photo_folder, tmp_path, method):
    changes = {"dropout": 0.0} | ({} if "rank" in METHODS[method] else {"rank": 16}) | METHODS[method]
    settings, backbone, adapter, *_ = prepared(checkpoints, photo_folder, tmp_path, **changes)
    cost = CostModel(settings, torch.float32, "cpu")
    trained = sum(p.numel() for _, p in adapter.named_parameters())
    assert cost.trained_numbers() == trained
    frozen = {p.data_ptr(): p.nbytes for p in backbone.model.parameters() if not p.requires_grad}
    assert off(cost.weight_bytes(), sum(frozen.values())) < 0.02


def test_steps_are_the_ones_that_are_trained(checkpoints, photo_folder, tmp_path, monkeypatch):
    settings, backbone, _, features, lessons, patches = prepared(
        checkpoints, photo_folder, tmp_path, micro_batch_tokens=300, batch_size=5
    )
    schedule = Schedule([1] * len(lessons), batch_size=5, epochs=3, seed=0)
    for step in range(schedule.num_steps):
        chosen = [lessons[example] for example, _ in schedule.step(step)]
        for count in (1, 3):
            places = [SimpleNamespace(index=i, count=count, sharded=False) for i in range(count)]
            shares = [Loader(backbone, features, place).fetch(chosen, 300) for place in places]
            real = [[shape_of(fetched) for fetched in share] for share in shares]
            counted = micro_shapes(chosen, patches, 300, count)
            assert [[shape._replace(branches=0) for shape in share] for share in counted] == real
            assert sum(s.branches for share in counted for s in share) == num_branches(chosen)
    cost = CostModel(settings, torch.float32, "cpu")
    whole = predict(settings, cost, lessons, patches)
    remembered = predict(settings, cost, lessons, patches, kept=0.0)
    monkeypatch.setattr("vlm_lora.model.features.IN_MEMORY_BYTES", 0)
    live = predict(settings, cost, lessons, patches, kept=0.0)
    once = sum(map(cost.tower_operations, patches.values()))
    assert [p.tower_operations for p in (whole, remembered, live)] == pytest.approx([0, once, 3 * once])
    assert whole.features == sum(entry.values.nbytes for entry in features.get(list(patches)))


def test_several_devices_wait_for_the_busiest(checkpoints, photo_folder, tmp_path):
    """Ten rows of two sizes, a row a pass: three steps of four rows, four and two."""
    settings, *_, lessons, patches = prepared(
        checkpoints, photo_folder, tmp_path, epochs=1, batch_size=4, micro_batch_tokens=16
    )
    lessons, cost = lessons[:10], CostModel(settings, torch.float32, "cpu")
    one, three, pieces = (
        predict(settings, cost, lessons, patches, gpus=gpus, sharded=sharded)
        for gpus, sharded in ((1, False), (3, False), (3, True))
    )
    assert one.imbalance == pytest.approx(1)
    assert three.operations == pytest.approx(one.operations)
    # Of four rows a device has two; of two, one. So three devices take about five rows' time for ten.
    assert off(three.imbalance, 5 * 3 / 10) < 0.15
    assert pieces.imbalance >= three.imbalance
    uneven = [[MicroShape(1, 100, 0, 1, 5, ()), MicroShape(1, 20, 0, 1, 5, ())], [MicroShape(1, 50, 0, 1, 5, ())]]
    long, short, middle = (cost.step_operations(shape) for share in uneven for shape in share)
    assert _waited_for(cost, uneven, False) == _waited_for(cost, uneven, True) == long + short
    assert _waited_for(cost, [uneven[0][::-1], uneven[1]], True) == middle + long


def test_pieces_of_the_layers_and_two_put_together(checkpoints, photo_folder, tmp_path):
    settings = config(checkpoints, photo_folder, tmp_path / "run", model=str(deep(checkpoints, tmp_path, 40)))
    whole, eighth = (CostModel(settings, torch.float32, "cpu").weight_bytes(pieces) for pieces in (1, 8))
    layer = load_backbone(str(checkpoints["qwen2_vl"])).language_model.layers[0]
    layers = 40 * sum(parameter.nbytes for parameter in layer.parameters())
    assert whole - eighth == pytest.approx(layers * (1 - 1 / 8 - 2 / 40), abs=2)


def deep(checkpoints, tmp_path, layers: int):
    """A folder whose config tells of so many language layers."""
    folder = copy_checkpoint(checkpoints["qwen2_vl"], tmp_path / "deep")
    settings = json.loads((folder / "config.json").read_text())
    text = settings.get("text_config", settings)
    text["num_hidden_layers"] = layers
    text["layer_types"] = ["full_attention"] * layers
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_time_is_predicted_from_the_second_and_third_step(checkpoints, photo_folder, tmp_path, monkeypatch, kept):
    settings, *_, lessons, patches = prepared(checkpoints, photo_folder, tmp_path, epochs=1, batch_size=4)
    cost = CostModel(settings, torch.float32, "cpu")
    three = predict(settings, cost, lessons, patches, kept=kept)  # all there are
    assert sum(three.first) == pytest.approx(three.operations + three.tower_operations)
    assert three.seconds_left(10.0) == pytest.approx(0, abs=1e-9)
    short = predict(settings.replace(batch_size=6, epochs=20), cost, lessons, patches, kept=kept)
    rest = short.operations + short.tower_operations - sum(short.first)
    assert rest == pytest.approx(short.operations * 37 / 40, rel=0.05)  # two steps an epoch: the tower's work is done
    monkeypatch.setattr("vlm_lora.model.features.IN_MEMORY_BYTES", 0)
    nine = predict(settings.replace(epochs=3), cost, lessons, patches, kept=kept)
    assert nine.first == three.first
    assert nine.seconds_left(10.0) == pytest.approx(30, rel=0.1)  # six more of four answers each
    one = predict(settings.replace(max_steps=1), cost, lessons, patches, kept=kept)
    assert one.first == three.first[:1]


def test_what_was_predicted_is_kept_beside_what_was_measured(checkpoints, photo_folder, tmp_path, capsys):
    train(config(checkpoints, photo_folder, tmp_path / "run"), events=(told := Told()))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    (cost,) = told.of("cost")
    assert line["predicted"]["seconds"] == cost["seconds"] > 0
    TrainReport(None).cost(**cost)
    assert "s were predicted from steps 2 and 3" in capsys.readouterr().err
    short = config(checkpoints, photo_folder, tmp_path / "short", max_steps=3)
    train(short, events=(told := Told()))
    (cost,) = told.of("cost")
    assert cost["seconds"] is None
    TrainReport(None).cost(**cost)
    assert "predicted from steps" not in capsys.readouterr().err
    train(short.replace(output=str(tmp_path / "job")), resume=True, events=(told := Told()))  # as scripts say it
    assert len(told.of("cost")) == 1
    train(short.replace(output=str(tmp_path / "job"), max_steps=4), resume=True, allow_change=["max_steps"],
          events=(told := Told()))  # fmt: skip
    assert told.of("cost") == []


def test_a_long_run_is_looked_at_in_parts(checkpoints, photo_folder, tmp_path, monkeypatch):
    settings, *_, lessons, patches = prepared(checkpoints, photo_folder, tmp_path, epochs=20)
    cost = CostModel(settings, torch.float32, "cpu")
    whole = predict(settings, cost, lessons, patches)
    monkeypatch.setattr("vlm_lora.training.cost.STEPS_LOOKED_AT", 20)
    part = predict(settings, cost, lessons, patches)
    assert off(part.operations, whole.operations) < 0.03


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter"])
def test_every_methods_time_is_measured(photo_folder, capsys, method):
    """With a vocabulary of 4,110, from which prefix and prompt draw words to start from."""
    assert main(["plan", str(photo_folder), "--model", "tiny", "--method", method, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rate"] > 0


def test_the_command_needs_no_weights(checkpoints, photo_folder, tmp_path, capsys):
    model = copy_checkpoint(checkpoints["qwen2_vl"], tmp_path / "bare")
    (model / "model.safetensors").unlink()
    (photo_folder / "05.png").write_bytes(b"not a picture")
    command = ["plan", str(photo_folder), "--model", str(model), "--rank", "4"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["unusable"], told["kept"]) == (10, 1, 1.0)
    assert told["rate"] > 0
    assert told["memory"] == told["cost"]["weights"] + told["cost"]["trained"] + told["cost"]["activations"]

    card = ["--gpus", "4", "--tflops", "2", "--device-memory", "24"]
    assert main([*command, *card, "--json"]) == 0
    four = json.loads(capsys.readouterr().out)
    imbalance = four["cost"]["imbalance"]
    assert 1 < imbalance < 4
    assert four["step_seconds"] == pytest.approx(four["cost"]["operations"] * imbalance / 2e12 / 4)
    assert (four["device"], four["dtype"]) == ("cuda", "bfloat16")
    if not torch.cuda.is_available():
        assert main([*command, "--gpus", "4", "--tflops", "2"]) == 2
        assert "no GPU here" in capsys.readouterr().err

    assert main([*command, "--tflops", "2", "--epochs", "1"]) == 0
    assert "each other image is seen once" in capsys.readouterr().out
    needed = told["memory"] / 1e9
    assert main([*command, "--tflops", "2", "--device-memory", str(needed * 0.9)]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "--micro-batch-tokens" in out
    assert "--fsdp" not in out

    several = ["plan", str(photo_folder), "--model", "tiny", *card]  # it has four layers
    assert main([*several, "--json"]) == 0
    short = ["--device-memory", str(1.11 * json.loads(capsys.readouterr().out)["memory"] / 1e9)]
    assert main([*several, *short]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "  --fsdp " in out
    assert main([*several, *short, "--fsdp"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main([*several, "--fsdp", "--method", "qlora"]) == 2
    assert "cannot be sharded" in capsys.readouterr().err
    assert main([*command, "--fsdp"]) == 2
    assert "--gpus" in capsys.readouterr().err
    assert main([*command, "--gpus", "0"]) == 2


@pytest.mark.parametrize("changes", [{}, {"epochs": 1}, {"val": "val", "val_split": 0.0}], ids=str)
def test_the_disk_is_what_training_fills(checkpoints, photo_folder, tmp_path, monkeypatch, changes):
    """Held-out images too, copies once, and what the tower has to do for them; a plan from before and from behind."""
    (photo_folder / "copy.png").write_bytes((photo_folder / "03.png").read_bytes())
    (photo_folder / "copy.txt").write_text("Another picture of number 3.")
    (tmp_path / "val").mkdir()
    picture(99).save(tmp_path / "val" / "new.png")
    (tmp_path / "val" / "new.txt").write_text("A new one.")
    for name in ("00.png", "00.txt"):  # of the same content as one to learn from, which goes
        (tmp_path / "val" / name).write_bytes((photo_folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = config(checkpoints, photo_folder, tmp_path / "run", on_bad_row="quarantine", **changes)
    plan = estimate_run(settings, tflops=1.0)
    assert plan.cached == 0
    assert plan.room > plan.cost.features
    train(settings)
    use = store_in(cache_folder()).use()
    assert plan.cost.features < use.num_bytes < plan.cost.features + 400 * use.entries
    cost = CostModel(settings, torch.float32, "cpu")
    patches = plan.cost.features // cost.traced.feature_bytes
    if not plan.seen_once:
        assert off(plan.cost.tower_operations, cost.tower_operations(80) * patches / 80) < 0.02  # of 64 to 96 each
    again = estimate_run(settings, tflops=1.0)
    assert (again.cached, again.cost.features) == (use.entries, plan.cost.features)


@pytest.mark.parametrize("changes", [{}, {"epochs": 1}, {"max_steps": 1}], ids=str)
def test_without_a_cache_on_disk_the_tower_runs_as_often_as_planned(checkpoints, photo_folder, tmp_path, changes):
    settings = config(checkpoints, photo_folder, tmp_path / "run", cache=False, **changes)
    plan = estimate_run(settings, tflops=1.0)
    computed = []
    real = FeatureCache._compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "_compute", lambda self, item: computed.append(item) or real(self, item))
        features = train(settings).features
    cost = CostModel(settings, torch.float32, "cpu")
    once = {item.name: cost.tower_operations(int(item.grid_thw.prod())) for item in computed}
    assert features.computed == len(once)
    assert plan.cost.tower_operations == pytest.approx(sum(once.values()), rel=0.1)  # which are in the steps, is luck


def test_each_device_has_a_memory_of_its_own():
    """Of images that come to any of four devices by chance."""
    draw = random.Random(0)
    for turns in (1, 3, 20):
        met = [len({draw.randrange(4) for _ in range(turns)}) for _ in range(5000)]
        assert _passes(turns, 1.0, 4) == pytest.approx(statistics.mean(met), rel=0.02)
    assert _passes(20, 0.0, 4) == 20
    assert (_passes(0.5, 1.0, 4), _passes(20, 1.0, 1)) == (0.5, 1)


def test_a_plan_knows_the_disk(checkpoints, photo_folder, tmp_path, monkeypatch, capsys):
    settings = config(checkpoints, photo_folder, tmp_path / "run")
    whole = estimate_run(settings, tflops=1.0)
    free = whole.cost.features // 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    half = estimate_run(settings, tflops=1.0)
    assert half.room == pytest.approx(0.9 * free, abs=1)
    held_out = whole.cost.features * 2 / 12  # they come first
    assert half.kept == pytest.approx((half.room - held_out) / (whole.cost.features - held_out), rel=0.05)
    assert half.cost.tower_operations == pytest.approx(whole.cost.tower_operations)  # main memory has room for the rest
    command = ["plan", str(photo_folder), "--model", settings.model, "--tflops", "1"]
    assert main(command) == 0
    assert "of the rest, main memory still holds 100% when they come again" in capsys.readouterr().out
    assert main([*command, "--no-cache"]) == 0
    assert "no features are kept (--no-cache); main memory still holds 100%" in capsys.readouterr().out
    monkeypatch.setattr("vlm_lora.model.features.IN_MEMORY_BYTES", 0)
    assert estimate_run(settings, tflops=1.0).cost.tower_operations > 1.2 * whole.cost.tower_operations


def test_an_impossible_plan_is_refused(checkpoints, photo_folder, tmp_path):
    with pytest.raises(DataError, match="no usable example"):
        estimate_run(config(checkpoints, photo_folder, tmp_path / "run", max_tokens=16), tflops=1.0)


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_memory():
    """By hand, on a device that does 100 operations in the time of a byte."""
    device = Device(tensor=100e12, float32=10e12, bandwidth=1e12, memory=1e9)
    large = Kernel("mm", torch.bfloat16, 10**12, 10**9)
    wide = Kernel("add", torch.bfloat16, 0, 10**10)
    none = Kernel("neg", torch.bfloat16, 0, 8)
    in_float32 = large._replace(dtype=torch.float32)
    priced = price(Traced(Counter({large: 2, wide: 1, none: 3}), 0, 0), device)
    assert priced.products == pytest.approx(2 * 0.01 / ATTAINED)
    assert priced.traffic == pytest.approx(0.01 / ATTAINED + 3 * SMALLEST)
    assert priced.launches == pytest.approx(6 * LAUNCH)
    assert (priced.seconds, priced.bound) == (priced.device, "products")
    assert price(Traced(Counter({in_float32: 1}), 0, 0), device).products == pytest.approx(0.1 / ATTAINED)
    assert price(Traced(Counter({none: 3}), 0, 0), device).bound == "launches"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=str)
def test_the_peak_is_the_allocators(checkpoints, photo_folder, tmp_path, family, changes):
    """Against what the CPU's allocator gives out and takes back in a real step, kernels' own buffers included."""
    settings, backbone, adapter, features, lessons, _ = prepared(
        checkpoints, photo_folder, tmp_path, family, dropout=0.0, **changes
    )
    loader = Loader(backbone, features, ALONE)
    (fetched,) = loader.fetch(lessons, 4096)
    batch = loader.place(fetched)
    for _, parameter in adapter.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()  # what an earlier test left, freed during the step, would count as memory the step gave back
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_sum(backbone, batch).backward()
    in_use = peak = 0
    for event in profile.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    assert in_use == 0
    cost = CostModel(settings, torch.float32, "cpu")
    assert off(cost.trace(shape_of(fetched, num_branches(lessons))).peak, peak) < 0.05


def test_a_run_is_priced_for_a_device_by_its_name(checkpoints, photo_folder, tmp_path, capsys):
    command = ["plan", str(photo_folder), "--model", str(checkpoints["qwen2_vl"])]
    assert main([*command, "--device", "h200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["device"], told["dtype"], told["device_memory"]) == ("cuda", "bfloat16", DEVICES["h200"].memory)
    assert told["kernels"] > 100
    assert 0 < told["peak_share"] < 0.01  # of a model that is nearly nothing, launches are all
    assert told["rate"] == pytest.approx(told["step_seconds"] and told["cost"]["operations"] / told["step_seconds"])
    assert main([*command, "--device", "t4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float16"  # it has no bfloat16
    wide = [*command, "--device", "t4", "--dtype", "float32"]
    assert main([*wide, "--json"]) == 0
    short = 0.6 * json.loads(capsys.readouterr().out)["memory"] / 1e9
    assert main([*wide, "--device-memory", str(short)]) == 0
    out = capsys.readouterr().out
    assert "--dtype float16" in out
    assert "bfloat16" not in out
    assert not told["compiles"]  # the run is too short
    assert main([*command, "--device", "h200", "--compile", "yes"]) == 0
    out = capsys.readouterr().out
    assert "waits for launches" in out
    assert "kept for the backward pass" in out
    assert "Plain layers are priced. This run would compile them" in out
    assert main([*command, "--device", "h200", "--tflops", "3"]) == 2
    assert "--device stands for its own" in capsys.readouterr().err
    assert main([*command, "--bandwidth", "3"]) == 2
    custom = ["--tflops", "800", "--bandwidth", "3900", "--device-memory", "141"]
    capsys.readouterr()
    assert main([*command, *custom, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device_memory"] == 141e9


def test_lora_costs_a_gpu_no_conversions(checkpoints, photo_folder, tmp_path):
    """Over a base in bfloat16 nothing as wide as a layer is in float32 but norms: counted, so that none comes back."""
    settings = config(checkpoints, photo_folder, tmp_path / "run", dtype="bfloat16").on("cuda")
    shape = MicroShape(4, 300, 200, 8, 80, (256,) * 4)

    def float32_products(device: str) -> float:
        kernels = CostModel(settings, torch.bfloat16, device).trace(shape).kernels
        return sum(n for kernel, n in kernels.items() if kernel.operations and kernel.dtype == torch.float32)

    assert float32_products("cuda") < 5  # rotary angles
    assert float32_products("cpu") > 20


def test_images_of_a_large_micro_batch_have_room_in_its_rows(checkpoints):
    """Forty rows with 639 image tokens, in prefixes of twenty: one row alone has no room for what is left over."""
    settings = TrainConfig(data="x", model=str(checkpoints["qwen2_vl"])).on("cpu")
    shape = MicroShape(40, 30, 20, 40, 40, (64,) * 39 + (60,))
    adapter = attach_adapter(load_shapes(settings.model), settings)
    placed = micro_batch(adapter.backbone, shape).input_ids == adapter.backbone.image_token_id
    assert (int(placed.sum()), int(placed.sum(1).max())) == (639, 16)
    assert CostModel(settings, torch.float32, "cpu").trace(shape).operations > 0


def test_attention_is_counted_as_torch_counts_it_also_where_keys_have_fewer_heads():
    """Which torch's own formulas refuse before 2.13."""
    queries, keys, fewer = torch.empty(2, 6, 50, 32), torch.empty(2, 6, 80, 32), torch.empty(2, 2, 80, 32)
    forward, backward = ATTENTION_OPERATIONS.values()
    assert forward(queries, keys, keys) == sdpa_flop(queries, keys, keys)
    assert backward(queries, queries, keys, keys) == sdpa_backward_flop(queries, queries, keys, keys)
    assert forward(queries, fewer, fewer) == forward(queries.shape, keys.shape, keys.shape)
    assert backward(queries, queries, fewer, fewer) == backward(queries, queries, keys, keys)


def test_images_in_branches_have_room_there_and_are_counted_in_each(checkpoints, tmp_path):
    """Rows with a system message and without differ before their image: each conversation has it for itself."""
    for i in range(2):
        picture(i, (64, 64)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "What?", "answer": "A cat."} for i in range(2)]
    rows += [row | {"system": "Be terse.", "question": "Where?"} for row in rows]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = config(checkpoints, tmp_path / "x.jsonl", tmp_path / "run", val_split=0.0)
    train(run)  # which ends with the prediction
    adapter = attach_adapter(load_backbone(run.model), run)
    encoder, grid = Encoder(adapter.backbone), torch.tensor([[1, 8, 8]])
    example = read_data(run, run.sources).examples[0]
    lesson = Lesson.of(example, encoder.sizes(example.dialogues, grid))
    ((shape,),) = micro_shapes([lesson], {example.images[0]: 64}, 10_000)
    assert shape.patches == (64, 64)
    assert shape.prefix < 16
    placed = micro_batch(adapter.backbone, shape).input_ids == adapter.backbone.image_token_id
    assert placed.sum() == 32
