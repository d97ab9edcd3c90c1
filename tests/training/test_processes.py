"""A run on several processes is the run on one: same order, same losses, same adapter; and none is left hanging."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, picture
from tests.forks import Forks, fewer_rows
from vlm_lora.config import TrainConfig
from vlm_lora.errors import ConfigError, TrainingError
from vlm_lora.training.batches import deal
from vlm_lora.training.cost import CostModel
from vlm_lora.training.processes import Processes, require_possible

# No reader gives examples without a picture; Python may. Here a quarter of them lose theirs as they are read. And each
# process tells what it learns in each step: the examples of all in order, and the labels of its own share.
TEXT_ONLY = """
import dataclasses, json, sys, vlm_lora.training.loop as loop, vlm_lora.training.prepare as prepare
read = prepare.read_data
def some_without_pictures(*given, **options):
    dataset = read(*given, **options)
    examples = [dataclasses.replace(e, images=e.images if i % 4 else ()) for i, e in enumerate(dataset.examples)]
    return dataclasses.replace(dataset, examples=tuple(examples))
prepare.read_data = some_without_pictures
run_steps = loop.TrainingLoop.run
def telling(self, *given):
    print(f"{self.loader.features.computed} images computed", file=sys.stderr)
    return run_steps(self, *given)
loop.TrainingLoop.run = telling
accumulate = loop.accumulate_gradients
def telling_what(loader, examples, fetched, *given):
    if fetched is not None:  # else it is the largest step, tried out before the first
        sources = [(each.example.place, len(each.branches)) for each in examples]
        labels = sorted(int(row[row >= 0].sum()) for batch in fetched for row in batch.packed.labels)
        print("LEARNT", json.dumps([sources, labels]), file=sys.stderr)
    return accumulate(loader, examples, fetched, *given)
loop.accumulate_gradients = telling_what
"""

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of unlike size with one to four answers each."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for i in range(12):
        picture(i, (64 + 16 * (i % 3), 64)).save(folder / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": f"Number {i}, said {'again ' * n}"} for n in range(1 + i % 4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def command(checkpoints, data) -> list[str]:
    """About nine answers a step: fewer images than processes in some steps, and a short last step of one image."""
    flags = "--rank 4 --epochs 2 --batch-size 9 --lr 1e-2 --val-split 0.2 --save-every 3 --no-eval --watch 2"
    return ["train", str(data), "--model", str(checkpoints["qwen2_vl"]), *flags.split()]


@pytest.fixture(scope="module")
def alone(forks, command, tmp_path_factory) -> Path:
    """The run on one process that the others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_LORA_CACHE", str(folder / "cache"))
        (ended,) = forks.run(1, *command, "--output", folder / "run", sabotage=TEXT_ONLY)
    assert ended.code == 0, ended.err
    (folder / "said").write_text(ended.err)
    return folder / "run"


def learnt(said: str) -> list[tuple]:
    """Of each step: the sources of its examples in order, and the labels' sums of the rows of this process."""
    return [tuple(json.loads(line)) for line in re.findall(r"^LEARNT (.*)$", said, re.MULTILINE)]


def lines(run: Path) -> list[dict]:
    """Without the last of a run in one go, of its cost."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "predicted" not in line]


def difference(run: Path, other: Path) -> float:
    """The largest difference of two runs' tensors, over their size."""
    one, two = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).norm() / two[name].norm()) for name in one)


def assert_same_run(run: Path, alone: Path) -> None:
    """To the order in which numbers of 32 bits are added up; what was learnt when, exactly."""
    here, there = lines(run), lines(alone)
    assert [(x["step"], x.get("answers"), x.get("tokens")) for x in here] == [
        (x["step"], x.get("answers"), x.get("tokens")) for x in there
    ]
    for name in ("loss", "held_out_loss", "grad_norm"):
        ours, theirs = ([x[name] for x in several if name in x] for several in (here, there))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert difference(run, alone) < 5e-4


@pytest.mark.parametrize(("count", "env"), [(2, {}), (4, {}), (2, FSDP2), (4, FSDP2)], ids=str)
def test_several_processes_are_one(forks, command, alone, tmp_path, count, env):
    ended = forks.run(count, *command, "--output", tmp_path / "run", env=env, sabotage=TEXT_ONLY)
    assert [e.code for e in ended] == [0] * count, ended
    assert_same_run(tmp_path / "run", alone)
    steps = learnt((alone.parent / "said").read_text())
    answers = [x["answers"] for x in lines(tmp_path / "run") if "answers" in x]
    assert len(steps) == len(answers) > 5
    assert 0 < answers[-1] < min(answers[:-1]), answers  # the last step is short
    for step, shares in zip(steps, zip(*(learnt(e.err) for e in ended), strict=True), strict=True):
        assert [sources for sources, _ in shares] == [step[0]] * count
        labels = sorted(label for _, own in shares for label in own if label)  # FSDP2 fills up with rows of none
        assert labels == step[1]
    assert ended[0].err.count("Data:") == 1
    computed = [int(re.search(r"(\d+) images computed", e.err)[1]) for e in ended]
    assert sum(computed) == 9, computed  # shared out, not each all of them
    for other in ended[1:]:
        assert (other.out, "vlm-lora" in other.err, "step" in other.err) == ("", False, False)
    balance = [x["imbalance"] for x in lines(tmp_path / "run") if "loss" in x]
    assert 1 <= min(balance) <= max(balance) <= count


def test_a_step_without_an_image_gives_the_projector_no_gradient(forks, command, data, tmp_path):
    """Rows one by one, half of them text alone: no process has an image in some steps, one has none in others."""
    sabotage = TEXT_ONLY.replace("i % 4", "i % 2")
    changes = "--targets projector --batch-size 3 --micro-batch-tokens 64 --max-steps 8"
    flags = [*command, *changes.split()]
    for name, count, env in (("one", 1, {}), ("two", 2, {}), ("pieces", 2, FSDP2)):
        ended = forks.run(count, *flags, "--output", tmp_path / name, env=env, sabotage=sabotage)
        assert [e.code for e in ended] == [0] * count, ended
        assert_same_run(tmp_path / name, tmp_path / "one")
    norms = [x["grad_norm"] for x in lines(tmp_path / "one") if "loss" in x]
    assert 0 < norms.count(0) < len(norms) == 8


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen3_vl", []),
        pytest.param("qwen3_5", [], marks=pytest.mark.long),
        pytest.param("qwen3_5", ["--gradient-checkpointing", "--variant", "dora"], marks=pytest.mark.long),
    ],
)
def test_what_a_family_has_of_its_own_reaches_layers_in_pieces(forks, command, checkpoints, tmp_path, family, more):
    """Qwen3-VL's DeepStack is added between layers that FSDP2 puts together and takes apart; Qwen3.5's forward runs
    twice in a layer that was put together once."""
    flags = [*command, "--model", checkpoints[family], "--max-steps", 6, *more]
    runs = [("one", 1, {}), ("pieces", 2, FSDP2), *([("two", 2, {})] if family == "qwen3_5" else [])]
    for name, count, env in runs:
        ended = forks.run(count, *flags, "--output", tmp_path / name, env=env, sabotage=TEXT_ONLY)
        assert [e.code for e in ended] == [0] * count, ended
        assert_same_run(tmp_path / name, tmp_path / "one")


def test_a_sample_of_the_held_out_images_is_the_same_on_several_and_one_looks_at_the_cache(forks, command, tmp_path):
    sabotage = """
import sys
from vlm_lora.model.store import Store
entries = Store._entries
def telling(self):
    print("LOOKED", file=sys.stderr)
    return entries(self)
Store._entries = telling
"""
    flags = [*command, "--val-split", "0.5", "--val-images", "3"]
    for name, count, env in (("one", 1, {}), ("two", 2, {}), ("pieces", 2, FSDP2)):
        ended = forks.run(count, *flags, "--output", tmp_path / name, env=env, sabotage=sabotage)
        assert [e.code for e in ended] == [0] * count, ended
        assert [e.err.count("LOOKED") for e in ended] == [1, 0][:count]
        assert_same_run(tmp_path / name, tmp_path / "one")
    of_all = [[x["held_out_loss_of_all"] for x in lines(tmp_path / name)[-1:]] for name in ("one", "two", "pieces")]
    torch.testing.assert_close(torch.tensor(of_all[1:]), torch.tensor(of_all[:1] * 2), rtol=1e-4, atol=1e-5)
    sizes = {(x["held_out_images"], x["held_out_of"]) for x in lines(tmp_path / "one") if "held_out_loss" in x}
    assert sizes == {(3, 6)}


def test_damaged_images_that_come_late_are_left_out_by_all(forks, command, data, tmp_path):
    """One process finds them, each knows of them: they are listed once, and the loss is the mean of what is left."""
    photos = tmp_path / "photos"
    shutil.copytree(data.parent, photos)
    damaged = {"2.png", "5.png", "7.png", "9.png", "11.png"}  # two of them have the shortest rows, which fill up passes
    for name in damaged:
        (photos / name).write_bytes((photos / name).read_bytes()[:300])
    flags = ["train", photos / data.name, *command[2:], "--validate-first", "no", "--on-bad-row", "quarantine"]
    flags += ["--epochs", "1", "--micro-batch-tokens", "96"]
    listed = []
    for name, count, env in (("one", 1, {}), ("two", 2, {}), ("pieces", 2, FSDP2)):
        ended = forks.run(count, *flags, "--output", tmp_path / name, env=env, sabotage=TEXT_ONLY)
        assert [e.code for e in ended] == [0] * count, ended
        assert_same_run(tmp_path / name, tmp_path / "one")
        rows = (tmp_path / name / "quarantined.jsonl").read_text().splitlines()
        assert len(set(rows)) == len(rows)
        listed.append(set(rows))
    assert listed[0] == listed[1] == listed[2]
    assert {json.loads(row)["reason"].split("'")[1] for row in listed[0]} == damaged


def test_gradients_that_are_not_added_up_give_another_adapter(forks, command, alone, tmp_path):
    """Negative control."""
    sabotage = TEXT_ONLY + "import vlm_lora.training.processes as p; p.Processes.add_up = lambda self, each: list(each)"
    ended = forks.run(2, *command, "--output", tmp_path / "run", sabotage=sabotage)
    assert ended[0].code == 0
    assert difference(tmp_path / "run", alone) > 0.05


def test_sharded_layers_are_held_in_pieces_and_the_comparison_at_the_end_works(forks, command, tmp_path):
    """As many bytes as the plan has, which adds two layers that are put together."""
    sabotage = """
from vlm_lora.training.loop import TrainingLoop
real = TrainingLoop.run
def counting(self, *rest):
    frozen = [p for p in self.backbone.language_model.layers.parameters() if not p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in self.backbone.model.parameters()]
    numbers = sum(p.to_local().numel() for p in frozen), sum(p.numel() for p in frozen)
    print("HELD", *numbers, sum(p.nbytes for p in local if not p.requires_grad))
    return real(self, *rest)
TrainingLoop.run = counting
"""
    arguments = [a for a in command if a != "--no-eval"] + ["--max-steps", "1", "--output", tmp_path / "run"]
    ended = forks.run(2, *arguments, env=FSDP2, sabotage=sabotage)
    assert [e.code for e in ended] == [0, 0], ended
    for end in ended:
        held, whole, base = map(int, end.out.partition("HELD")[2].split()[:3])
        assert held == whole // 2 > 0
        planned = CostModel(TrainConfig(data="x", model=command[3]), torch.float32, "cpu").weight_bytes(2)
        assert abs((planned - 4 * whole) / base - 1) < 0.02  # this model has no more than two layers
    assert "Base against tuned, held out: 2 images" in ended[0].out
    assert ended[1].out.count("\n") == 1
    assert (tmp_path / "run/report.html").exists()


def test_stopped_and_gone_on_with_by_another_number_of_processes(forks, command, alone, tmp_path):
    """1 -> 2 -> 2 sharded -> 1, each stopped by a signal to one process only."""
    run = ["--output", tmp_path / "run"]
    (first,) = forks.run(1, *command, *run, at=(0, 2, signal.SIGTERM), sabotage=TEXT_ONLY)
    assert first.code == 143
    second = forks.run(2, *command, *run, "--resume", at=(1, 4, signal.SIGINT), sabotage=TEXT_ONLY)
    assert [e.code for e in second] == [130, 130], second
    assert second[0].err.count("stopped after step 4 and saved") == 1
    assert "stopped after" not in second[1].err
    third = forks.run(2, *command, *run, "--resume", at=(0, 5, signal.SIGTERM), sabotage=TEXT_ONLY, env=FSDP2)
    assert [e.code for e in third] == [143, 143], third
    (last,) = forks.run(1, *command, *run, "--resume", sabotage=TEXT_ONLY)
    assert last.code == 0
    assert "Resumed from step 5" in last.err
    assert_same_run(tmp_path / "run", alone)


def test_out_of_memory_in_one_process_has_all_try_the_step_again(forks, command, alone, tmp_path):
    sabotage = (
        TEXT_ONLY
        + """
import os, torch, vlm_lora.training.step as step
real, calls = step.loss_sum, []
def short_of_memory(*given):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(*given)
step.loss_sum = short_of_memory
"""
    )
    ended = forks.run(2, *command, "--output", tmp_path / "run", sabotage=sabotage)
    assert [e.code for e in ended] == [0, 0], ended
    assert ended[0].err.count("Out of memory: from here on") == 1
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("env", [{}, FSDP2], ids=["whole", "sharded"])
def test_one_process_killed_ends_the_others_with_one_clear_line(forks, command, tmp_path, env):
    ended = forks.run(2, *command, "--output", tmp_path / "run", at=(1, 4, signal.SIGKILL), env=env)
    assert ended[1].code == -signal.SIGKILL
    assert ended[0].code == 1
    assert ended[0].late < 60
    assert "lost the others" in ended[0].err
    assert "--resume" in ended[0].err
    assert "Traceback" not in ended[0].err
    assert (tmp_path / "run/checkpoints/step-000003/manifest.json").exists()


def test_a_main_process_that_stands_still_in_a_save_is_not_waited_for(forks, command, tmp_path):
    """It stands still until the other has ended, or for a minute."""
    sabotage = f"""
import datetime, os, pathlib, time, vlm_lora.training.loop as loop, vlm_lora.training.processes as processes
processes.STEP = datetime.timedelta(seconds=6)
pid = pathlib.Path({str(tmp_path / "pid")!r})
if os.environ["RANK"] == "1":
    pid.write_text(str(os.getpid()))
def stand_still(*given):
    started = time.monotonic()
    while time.monotonic() - started < 60 and pathlib.Path("/proc", pid.read_text()).exists():
        time.sleep(0.1)
loop.save_checkpoint = stand_still
"""
    ended = forks.run(2, *command, "--max-steps", "1", "--output", tmp_path / "run", sabotage=sabotage)
    assert ended[1].code == 1, ended
    assert ended[1].late == 0
    assert "lost the others" in ended[1].err
    assert "--resume" in ended[1].err


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("shape mismatch: value tensor of shape [4] cannot be broadcast"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_only_what_goes_wrong_between_processes_is_a_lost_one(error, lost):
    here = Processes.connected(SimpleNamespace(index=0, count=2))
    with pytest.raises(TrainingError if lost else type(error)) as caught, here:
        raise error
    assert (caught.value is error) is not lost
    assert ("lost the others" in str(caught.value)) is lost


def test_what_is_wrong_for_all_is_said_once(forks, command, alone, tmp_path):
    refused = forks.run(2, *command, "--method", "qlora", "--output", tmp_path / "run", env=FSDP2)
    assert [e.code for e in refused] == [2, 2]
    assert "four-bit weights cannot be sharded" in refused[0].err
    again = forks.run(2, *command, "--output", alone)
    assert [e.code for e in again] == [1, 1]
    assert "holds a run already" in again[0].err
    unlike = forks.run(
        2, *command, "--output", tmp_path / "run", sabotage=fewer_rows("vlm_lora.training.prepare", "read_data")
    )
    assert [e.code for e in unlike] == [1, 1]
    assert "All machines of a run need the same data" in unlike[0].err
    other = forks.run(2, "check", "x")
    assert [e.code for e in other] == [2, 2]
    assert "runs in one process, only train, caption, eval in several" in other[0].err


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        (FSDP2, "qlora", "cannot be sharded"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "lora", "offload"),
        ({"ACCELERATE_USE_FSDP": "true"}, "lora", "--fsdp_version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "lora", "FSDP2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "lora", "--dtype"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "lora", "--dtype"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "lora", "--batch-size"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, "lora", "--batch-size"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "lora", "inductor"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "lora", "--gradient-checkpointing"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "lora", "--fsdp_reshard_after_forward"),
    ],
)
def test_settings_of_accelerate_that_cannot_be_followed_are_refused(settings, method, message):
    with pytest.raises(ConfigError, match=message) as caught:
        require_possible(method, settings)
    assert "\n" not in str(caught.value)
    assert require_possible("lora", FSDP2)
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "FSDP_VERSION": "2"}
    assert not require_possible("qlora", launched | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})
    launched |= FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert require_possible("lora", launched)


def test_rows_are_dealt_out_evenly_and_each_once():
    sizes = torch.randint(20, 400, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = deal(sizes, 5)
    assert sorted(i for share in shares for i in share) == list(range(64))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) * 5 / sum(loads) < 1.02
    assert deal(sizes, 5) == shares
    assert deal(sizes[:2], 4).count([]) == 2


RECIPES = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RECIPES, re.MULTILINE | re.DOTALL)


def test_the_recipes_are_right_in_form():
    scripts = blocks("sh") + [yaml.safe_load(text)["run"] for text in blocks("yaml")]
    assert len(scripts) == 6
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert re.search(r"-m vlm_lora (train|caption|eval) ", script)
    for text in blocks("python"):
        compile(text, "docs/distributed.md", "exec")


def recipe(program: str, module: str, data: str, *flags: str, **changes: str) -> list[str]:
    """The first recipe that begins with ``program``, for a CPU: with words of it changed."""
    line = next(text for text in blocks("sh") if text.startswith(program)).partition(program.split(" -")[0])[2]
    words = [changes.get(word, word) for word in shlex.split(line.replace("\\\n", ""))]
    head = words[: words.index("train") + 1]
    return [sys.executable, "-m", module, *head, data, *flags]


@pytest.mark.long
def test_the_recipes_lines_run_and_one_killed_process_ends_the_run(forks, command, tmp_path):
    """Killed on one of two machines, which are this one; resumed to the end under accelerate, sharded."""
    # At the other tests' 1e-2, rounding grows over 30 steps in some tensors: AdamW divides gradients by their own size.
    changes = "--save-every 10 --max-steps 30 --epochs 100 --lr 1e-3"
    flags = [*command[2:], *changes.split(), "--output", str(tmp_path / "run")]
    settings = {"cwd": ROOT, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = {"8": "1", "first-machine:29500": f"127.0.0.1:{probe.getsockname()[1]}"}
    line = recipe("torchrun --nnodes", "torch.distributed.run", command[1], *flags, **here)
    machines = [subprocess.Popen(line, stderr=subprocess.PIPE, **settings) for _ in range(2)]
    log = tmp_path / "run/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 4):
        assert [m.poll() for m in machines] == [None, None], [m.communicate() for m in machines]
        time.sleep(0.02)
    (worker,) = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    said = [machine.communicate(timeout=120)[1] for machine in machines]
    assert all(machine.returncode for machine in machines)
    assert "".join(said).count("2 processes share each step") == 1
    assert "lost the others" in said[0]

    line = recipe("accelerate launch", "accelerate.commands.launch", command[1], *flags, "--resume", **{"8": "2"})
    ended = subprocess.run(line, capture_output=True, timeout=900, **settings)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 processes share each step, the base's layers in pieces (FSDP2);") == 1
    assert ended.stdout.count("Adapter:") == 1
    assert [x["step"] for x in lines(tmp_path / "run") if "loss" in x] == list(range(1, 31))
    (ended,) = forks.run(1, "train", command[1], *flags, "--output", tmp_path / "alone")
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "run", tmp_path / "alone")
