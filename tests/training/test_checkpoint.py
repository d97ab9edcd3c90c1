"""Checkpoints alone, without a model: damage to each file, a stop at each call of a save, order, leftovers."""

import os
import shutil

import pytest
import torch

from bench.kill_campaign import stopped_at
from vlm_lora.training.checkpoint import Progress, load_checkpoint, save_checkpoint

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
    assert (tmp_path / "step-000003.damaged").is_dir()
    assert state.progress.step == 2
    assert same(state, after(2))
    state.step()
    state.save(tmp_path)
    assert same(state, after(3))
    again = State()
    assert again.load(tmp_path) == []
    assert again.progress.step == 3


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
                with stopped_at(place, torn):
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
    assert len(found) > 60
    assert found == sorted(found)
    assert set(found) == {3, 4}
