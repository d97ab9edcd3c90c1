"""Checkpoints of a run: all that a step needs beyond the config and the data, which is weights, optimizer, step.

A checkpoint is a folder ``step-000200`` with ``adapter.safetensors``, ``optimizer.safetensors`` and, written last,
``manifest.json`` with the size and hash of both. It is written under a temporary name and renamed, so a folder with
its right name is whole; one that was damaged later is found by its hashes, set aside, and the one before it used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from vlm_lora.errors import CheckpointError

MANIFEST = "manifest.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


def save_checkpoint(
    folder: Path, step: int, parameters: NamedParameters, optimizer: torch.optim.Optimizer, identity: dict, keep: int
) -> Path:
    """Write the state after ``step`` optimizer steps and delete all but the newest ``keep``.

    ``identity`` says which run this is (config and data); `load_checkpoint` compares it.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file({name: p.detach().contiguous().cpu() for name, p in parameters}, temporary / ADAPTER)
        save_file(_optimizer_tensors(parameters, optimizer), temporary / OPTIMIZER)
        files = {file.name: _describe(file) for file in (temporary / ADAPTER, temporary / OPTIMIZER)}
        manifest = {"step": step, "identity": identity, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({error.strerror or error}); those before it are intact. "
            "Make room or give another --output, then go on with --resume."
        ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    folder: Path,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    identity: dict,
    warn: Callable[[str], None],
) -> int:
    """Restore the newest valid checkpoint and return its step; 0 if there is none.

    Raises:
        CheckpointError: the checkpoint is of another run: config or data have changed; the difference is shown.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            manifest, contents = _read(path)
        except (OSError, ValueError, KeyError) as error:
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"{path.name} is damaged ({error}); it is set aside as {aside.name}, the one before it is used.")
            continue
        changed = [key for key in identity if manifest["identity"].get(key) != identity[key]]
        if changed:
            told = "; ".join(f"{key}: {manifest['identity'].get(key)!r}, now {identity[key]!r}" for key in changed)
            raise CheckpointError(
                f"{path}: belongs to a run with other settings or data ({told}). Start a new --output."
            )
        weights, state = load(contents[ADAPTER]), load(contents[OPTIMIZER])
        if set(weights) != {name for name, _ in parameters}:
            raise CheckpointError(f"{path}: holds other tensors than this run trains.")
        with torch.no_grad():
            for name, parameter in parameters:
                parameter.copy_(weights[name])
        _restore_optimizer(parameters, optimizer, state)
        return manifest["step"]
    return 0


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step; never by time, which clocks and copies change."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def _read(path: Path) -> tuple[dict, dict[str, bytes]]:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    contents = {}
    for name, described in manifest["files"].items():
        contents[name] = (path / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != described["sha256"]:
            raise ValueError(f"{name} is not what was written")
    if set(contents) != {ADAPTER, OPTIMIZER}:
        raise ValueError("a file is missing from its list")
    return manifest, contents


def _describe(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous().cpu()
        for name, parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(parameters: NamedParameters, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    state = {}
    for index, (name, _) in enumerate(parameters):
        prefix = name + "/"
        state[index] = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if not state[index]:
            raise CheckpointError(f"The checkpoint holds no optimizer state for {name}.")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
