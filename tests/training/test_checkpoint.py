"""Checkpoints alone, without a model: damage to each file, a stop at each call of a save, order, leftovers."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from bench.kill_campaign import stopped_at
from vlm_lora.errors import CheckpointError
from vlm_lora.training import checkpoint
from vlm_lora.training.checkpoint import FORMAT, Progress, load_checkpoint, load_optimizer, save_checkpoint

LOOKING = {"close", "fspath", "fstat", "fsync", "getpid", "is_dir", "listdir", "lstat", "read", "scandir", "stat"}
"""Calls that change nothing a kill would leave: before one it leaves what it leaves before the next. The campaign stops
at each of them too."""

IDENTITY = {"lr": 1e-3, "data_fingerprint": "0" * 64}


class State:
    """Two parameters and their optimizer; ``step`` moves both by numbers that depend on the step."""

    def __init__(self):
        self.parameters = [(name, torch.nn.Parameter(torch.zeros(3, 2))) for name in ("a.lora_A.x", "b.lora_B.x")]
        self.optimizer = torch.optim.AdamW([p for _, p in self.parameters], lr=0.1)
        self.progress = Progress(micro_batch_tokens=4096)

    def step(self) -> None:
        self.progress.step += 1
        for i, (_, parameter) in enumerate(self.parameters):
            parameter.grad = torch.full_like(parameter, self.progress.step + i)
        self.optimizer.step()

    def save(self, folder, keep: int = 3) -> None:
        save_checkpoint(folder, self.progress, self.parameters, self.optimizer, IDENTITY, keep)

    def load(self, folder) -> list[str]:
        told: list[str] = []
        self.progress = load_checkpoint(folder, self.progress, self.parameters, self.optimizer, IDENTITY, told.append)
        return told

    def tensors(self) -> list[torch.Tensor]:
        moments = [t for _, p in self.parameters for _, t in sorted(self.optimizer.state[p].items())]
        return [p.detach().clone() for _, p in self.parameters] + [t.clone() for t in moments]


def after(steps: int, folder=None, **options) -> State:
    state = State()
    for _ in range(steps):
        state.step()
        if folder:
            state.save(folder, **options)
    return state


def same(one: State, other: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_state_of_a_paged_optimizer_is_loaded_into_paged_memory(monkeypatch):
    """On a CPU nothing is paged; that the state is what `get_state_buffer` gave is what makes it so on a GPU."""
    optim = pytest.importorskip("bitsandbytes.optim")

    def stepped():
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
        optimizer = optim.PagedAdamW(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.arange(1.0, len(parameter) + 1)
        optimizer.step()
        return optimizer, parameters

    buffers = []
    get = optim.PagedAdamW.get_state_buffer
    monkeypatch.setattr(
        optim.PagedAdamW, "get_state_buffer", lambda *a, **k: buffers.append(get(*a, **k)) or buffers[-1]
    )
    (before, old), (after, new) = stepped(), stepped()
    for parameter in old:
        parameter.grad *= 2
    before.step()
    buffers.clear()
    load_optimizer(after, before.state_dict())
    for one, other in zip(old, new, strict=True):
        assert after.state[other]["step"] == 2
        for key in ("state1", "state2"):
            assert torch.equal(after.state[other][key], before.state[one][key])
            assert any(after.state[other][key] is buffer for buffer in buffers), "the state is not paged"


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "one bit"])
def test_damage_to_any_file_is_seen_and_the_one_before_is_used(tmp_path, file, damage):
    """F4, F5: the engine most others wrap goes on without optimizer state, in silence."""
    after(3, tmp_path)
    path = tmp_path / "step-000003" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    state = State()
    told = state.load(tmp_path)
    assert told[0].startswith("step-000003 is damaged")
    assert told[0].endswith("it is set aside as step-000003.damaged, and step-000002 is used.")
    assert (tmp_path / "step-000003.damaged").is_dir()
    assert state.progress.step == 2
    assert same(state, after(2))
    state.step()
    state.save(tmp_path)
    assert same(state, after(3))
    again = State()
    assert again.load(tmp_path) == []
    assert again.progress.step == 3


@pytest.mark.parametrize(("number", "other"), [('"skipped": 0', '"skipped": 1'), ('"lr": 0.001', '"lr": 0.003')])
def test_another_number_in_a_manifest_is_damage(tmp_path, number, other):
    """It reads as well as before: only the hash tells."""
    after(2, tmp_path)
    manifest = tmp_path / "step-000002/manifest.json"
    text = manifest.read_text()
    assert text.count(number) == 1
    manifest.write_text(text.replace(number, other))
    (told,) = State().load(tmp_path)
    assert "step-000002 is damaged" in told


def rewritten(path, change) -> None:
    """The manifest as ``change`` makes it, with the hash that belongs to it."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest = change(manifest)
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{}", "\xff", "a field unknown", "optimizer not listed"])
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path, text):
    after(2, tmp_path)
    newest = tmp_path / "step-000002"
    if text == "a field unknown":
        rewritten(newest, lambda manifest: manifest | {"progress": manifest["progress"] | {"epoch": 1}})
    elif text == "optimizer not listed":
        rewritten(newest, lambda manifest: manifest | {"files": {"adapter.safetensors": {}}})
    else:
        (newest / "manifest.json").write_bytes(text.encode("latin-1"))
    state = State()
    (told,) = state.load(tmp_path)
    assert "step-000002 is damaged" in told
    assert same(state, after(1))


def test_with_no_whole_checkpoint_left_a_run_does_not_begin_anew(tmp_path):
    """F4, F5 for all there are, and again on the second try."""
    after(2, tmp_path)
    for path in tmp_path.iterdir():
        (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no whole.*optimizer\.safetensors is gone.*000002\.damaged") as refused:
        State().load(tmp_path)
    assert "step-000001.damaged" in str(refused.value)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*step-000001\.damaged, step-000002\.damaged"):
        State().load(tmp_path)
    assert State().load(tmp_path / "checkpoints not yet there") == []


def test_another_releases_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    after(1, tmp_path)
    rewritten(tmp_path / "step-000001", lambda manifest: manifest | {"format": FORMAT + 1})
    with pytest.raises(CheckpointError, match=r"000001: was written by another release .*format 5; this one reads 4"):
        State().load(tmp_path)
    assert (tmp_path / "step-000001").is_dir()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_does_not_read_now_is_no_damage(tmp_path, monkeypatch, number):
    after(2, tmp_path)
    real = Path.read_bytes

    def read_bytes(path):
        if path.name == "optimizer.safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(CheckpointError, match=rf"step-000002: cannot be read \({os.strerror(number)}\)"):
            State().load(tmp_path)
    state = State()
    assert state.load(tmp_path) == []
    assert state.progress.step == 2


def test_a_damaged_one_that_cannot_be_set_aside_is_said_in_one_line(tmp_path, monkeypatch):
    after(2, tmp_path)
    (tmp_path / "step-000002/manifest.json").unlink()

    def rename(path, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match=r"step-000002\.damaged: could not be written \(Read-only file system\)"):
        State().load(tmp_path)


def test_a_disk_without_room_for_a_folder_is_what_is_said(tmp_path, monkeypatch):
    """And not that there is no folder to clear away."""
    state, mkdir = after(1, tmp_path), Path.mkdir

    def full(path, *args, **options):
        if path.name.startswith("."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    state.step()
    with pytest.raises(CheckpointError, match=r"step-000002: could not be written \(No space left on device\)"):
        state.save(tmp_path)


def test_a_save_reaches_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Files and folder before the rename, the folder that it is in behind; and first the one that holds that."""
    done = []
    real_sync, real_rename = checkpoint._sync, os.rename

    def rename(old, new):
        done.append(f"rename to {new.name}")
        real_rename(old, new)

    monkeypatch.setattr(checkpoint, "_sync", lambda path: done.append(path.name) or real_sync(path))
    monkeypatch.setattr(checkpoint.os, "rename", rename)
    (tmp_path / "run").mkdir()
    state = after(1)
    state.save(tmp_path / "run/checkpoints")
    files = {"adapter.safetensors", "optimizer.safetensors", "manifest.json"}
    assert done[0] == "run"
    assert set(done[1:4]) == files
    assert done[4:] == [f".step-000001-{os.getpid()}", "rename to step-000001", "checkpoints"]


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(tmp_path):
    """F9; and by number, not by name, where six digits are not enough."""
    after(2, tmp_path)
    os.utime(tmp_path / "step-000001", (4e9, 4e9))
    os.utime(tmp_path / "step-000002", (1, 1))
    state = State()
    state.load(tmp_path)
    assert state.progress.step == 2
    state.progress.step = 999_999
    state.save(tmp_path)
    state.progress.step = 1_000_000
    state.save(tmp_path)
    state.load(tmp_path)
    assert state.progress.step == 1_000_000


def test_the_best_is_kept_beside_the_newest(tmp_path):
    state = State()
    for _ in range(5):
        state.step()
        state.progress.best_step = min(2, state.progress.step)
        state.save(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000005"]


def test_a_save_can_be_stopped_before_any_call_into_the_operating_system(tmp_path):
    """F1, forced: whatever it had done until then, the state before or after it is found, whole; as in the campaign."""
    before, found = tmp_path / "before", []
    after(3, before, keep=2)
    wanted = {step: after(step) for step in (3, 4, 5)}
    ready = State()
    ready.load(before)
    ready.step()
    for torn, place in [(True, 1), (True, 2)] + [(False, n) for n in range(1, 1000)]:
        folder = tmp_path / "stopped"
        shutil.copytree(before, folder)
        child = os.fork()
        if not child:
            try:
                with stopped_at(place, torn, skip=LOOKING):
                    ready.save(folder, keep=2)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        state = State()
        assert state.load(folder) == []
        assert same(state, wanted[state.progress.step])
        found.append(state.progress.step)
        while state.progress.step < 5:
            state.step()
            state.save(folder, keep=2)
        assert same(state, wanted[5])
        assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000005"]
        shutil.rmtree(folder)
        if status == 0:  # it has made all its calls
            break
    assert len(found) > 20
    assert found == sorted(found)
    assert set(found) == {3, 4}


def test_a_checkpoint_from_before_pictures_were_noted_can_be_resumed_from(tmp_path):
    now = {"lr": 1.0, "pictures_fingerprint": "a" * 64}
    assert checkpoint._check_identity(tmp_path, {"lr": 1.0}, now, (), True) == set()
    with pytest.raises(CheckpointError, match="pictures: 'bbbbbbbb', now 'aaaaaaaa'"):
        checkpoint._check_identity(tmp_path, {"lr": 1.0, "pictures_fingerprint": "b" * 64}, now, (), True)
