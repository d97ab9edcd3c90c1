"""Checkpoints: all that a step needs beyond the config and the data.

A checkpoint is a folder ``step-000200`` with ``adapter.safetensors``, ``optimizer.safetensors`` and, written last,
``manifest.json`` with the hashes of both and of itself. It is written under a temporary name and renamed, and loses its
name before it is deleted, so a folder with its right name is whole; one that was damaged later is found by its hashes,
set aside, and the one before it used. Where there is none, that is an error: the run would begin anew in silence.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from vlm_lora.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
FORMAT = 4
"""Of the manifest; one more with every change that an older release would misread. 1 has no ``val_images``, 2 no
``loss_scale``, 3 no ``damaged``."""

FIRST_SCALE, DOUBLED_AFTER = 2.0**16, 2000
"""Of float16: gradients below 6e-8 would be zeros in it, so that the loss is scaled up as far as they can be held
(arXiv:1710.03740). The scale at first, and the steps after which it is doubled; torch's GradScaler has the same."""

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass
class Progress:
    """What a run has come to beside its tensors; kept in every checkpoint's manifest."""

    micro_batch_tokens: int
    """What of ``--micro-batch-tokens`` is left after running out of memory."""
    step: int = 0
    skipped: int = 0
    """Steps whose numbers were not finite."""
    best_step: int | None = None
    best_loss: float | None = None
    since_best: int = 0
    """Evaluations on held-out data since the best one."""
    val_images: int | None = None
    """Held-out images that the losses so far are of; None: all there are."""
    loss_scale: float | None = None
    """What the loss is multiplied by before the backward pass; None, for nothing, but in float16."""
    steps_at_scale: int = 0
    """Steps since the scale was last changed."""
    overflows: int = 0
    """How often a step was computed again, with half the scale."""
    damaged: list[tuple[str, int | None, str]] = field(default_factory=list)
    """Source, line and reason of each row whose image turned out to be damaged during the steps."""

    def note_held_out_loss(self, loss: float) -> None:
        """The held-out loss after ``step``: the best so far, or one more since."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.since_best = self.step, loss, 0
        else:
            self.since_best += 1

    def halve_scale(self) -> None:
        assert self.loss_scale is not None
        self.loss_scale, self.steps_at_scale, self.overflows = self.loss_scale / 2, 0, self.overflows + 1

    def note_scaled_step(self) -> None:
        """A step whose gradients were finite: after many, the scale may be doubled."""
        if self.loss_scale is None:
            return
        self.steps_at_scale += 1
        if self.steps_at_scale == DOUBLED_AFTER:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full, read-only or vanished disk inside is a `CheckpointError` that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: could not be written ({reason}). The checkpoints before were not touched. Make room, or see that "
            "the folder is there and writable; then continue with --resume."
        ) from error


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    identity: dict,
    keep: int,
) -> Path:
    """Write the state after ``progress.step`` steps, and delete all but the newest ``keep`` and the best.

    ``identity`` says which run this is (config and data); `load_checkpoint` compares it.
    """
    target = _named(folder, progress.step)
    temporary = folder / f".{target.name}-{os.getpid()}"
    with writing(target):
        try:
            if not folder.exists():
                folder.mkdir()  # not its parents: a run folder that has vanished is not made anew
                _sync(folder.parent)
            temporary.mkdir()
            save_file({name: p.detach().contiguous().cpu() for name, p in parameters}, temporary / ADAPTER)
            save_file(_optimizer_tensors(parameters, optimizer), temporary / OPTIMIZER)
            files = {file.name: _describe(file) for file in (temporary / ADAPTER, temporary / OPTIMIZER)}
            manifest = {"format": FORMAT, "progress": asdict(progress), "identity": identity, "files": files}
            manifest["sha256"] = _digest(manifest)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            os.rename(temporary, target)
            _sync(folder)
        except (OSError, SafetensorError):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in _checkpoints(folder)[:-keep]:
            if _step_of(old) != progress.best_step:
                doomed = old.with_name(f".{old.name}-old")
                os.rename(old, doomed)
                shutil.rmtree(doomed)
    return target


def load_checkpoint(
    folder: Path,
    start: Progress,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    identity: dict,
    warn: Callable[[str], None],
    allow_change: Collection[str] = (),
) -> Progress:
    """Restore the newest valid checkpoint and return its progress; ``start`` if there is none.

    ``allow_change`` names what may have changed in the config, or ``data``, ``val``, ``base``.

    Raises:
        CheckpointError: config or data have changed (the difference is shown), perhaps so that the tensors are others;
            a checkpoint cannot be read now, though it may be whole; all that there are have been damaged.
    """
    for leftover in folder.glob(".step-*"):  # of a process that was killed while it saved or deleted
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for path in reversed(_checkpoints(folder)):
        try:
            progress, before, contents = _read(path)
        except _Damaged as error:
            aside = path.with_name(path.name + ".damaged")
            with writing(aside):
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)
            damaged.append(f"{path.name} is damaged ({error}); it is set aside as {aside.name}")
            continue
        for text in damaged:
            warn(f"{text}, and {path.name} is used.")
        weights = load(contents[ADAPTER])
        fits = _shapes(weights.items()) == _shapes(parameters)
        changed = _check_identity(path, before, identity, allow_change, fits)
        _restore_weights(path, parameters, weights)
        _restore_optimizer(parameters, optimizer, load(contents[OPTIMIZER]))
        if "micro_batch_tokens" in changed:
            progress.micro_batch_tokens = start.micro_batch_tokens
        return progress
    if aside := sorted(path.name for path in folder.glob("step-*.damaged")):
        why = "; ".join(damaged) or f"set aside before as damaged: {', '.join(aside)}"
        raise CheckpointError(
            f"{folder}: no whole checkpoint is left to resume from ({why}). Put one back from a copy, without .damaged "
            "in its name, or start again with another --output."
        )
    return start


def load_weights(folder: Path, step: int, parameters: NamedParameters) -> None:
    """The adapter's tensors as they were behind ``step``.

    Raises:
        CheckpointError: that checkpoint is damaged or gone.
    """
    path = _named(folder, step)
    try:
        _, _, contents = _read(path)
    except _Damaged as error:
        raise CheckpointError(
            f"{path}: the best checkpoint is damaged or gone ({error}). Continue with --resume, without --patience and "
            "--load-best-at-end, to end with the last adapter instead."
        ) from error
    _restore_weights(path, parameters, load(contents[ADAPTER]))


def _check_identity(path: Path, before: dict, now: dict, allow_change: Collection[str], fits: bool) -> set[str]:
    """What has changed, by the names that ``allow_change`` knows; an error if that holds not all of them, or if the
    tensors no longer fit."""
    before = {"pictures_fingerprint": now.get("pictures_fingerprint")} | before  # older checkpoints do not have it
    if now.get("micro_batch_tokens") is None:  # decided by the GPU: the run keeps what it was decided by then
        before = {**before, "micro_batch_tokens": None}
    changed = {key.removesuffix("_fingerprint"): key for key in now if before.get(key) != now[key]}
    known = {key.removesuffix("_fingerprint") for key in now}
    if unknown := sorted(set(allow_change) - known):
        raise ConfigError(f"--allow-change {unknown[0]}: expected one of {', '.join(sorted(known))}.")
    refused = [name for name in changed if name not in allow_change or not fits]
    told = "; ".join(f"{n}: {_short(before.get(changed[n]))}, now {_short(now[changed[n]])}" for n in refused)
    if "base" in refused:
        told += ": another model, number format or image size, or an adapter has been merged into it"
    if refused and not fits:
        raise CheckpointError(
            f"{path}: holds other tensors than this run trains ({told}), which no --allow-change makes fit. Give the "
            "settings of before, or start a new --output."
        )
    if refused:
        raise CheckpointError(
            f"{path}: belongs to a run with other settings or data ({told}). Start a new --output, or "
            f"continue anyway with --allow-change {','.join(refused)}: the run can then no longer be repeated exactly."
        )
    return set(changed)


def _short(value: object) -> str:
    """As it is shown; of a fingerprint the beginning."""
    return repr(value[:8]) if isinstance(value, str) and len(value) == 64 else repr(value)


def _named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step; never by time, which clocks and copies change."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), key=_step_of)


class _Damaged(Exception):
    """A checkpoint is not what was written."""


def _read(path: Path) -> tuple[Progress, dict, dict[str, bytes]]:
    """Progress, identity, and the files' contents.

    Raises:
        CheckpointError: it cannot be read, which may pass, or was written by another release; it stays where it is.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest.pop("sha256") != _digest(manifest):
            raise _Damaged(f"{MANIFEST} is not what was written")
        if manifest.get("format") not in (1, 2, 3, FORMAT):
            raise CheckpointError(
                f"{path}: was written by another release of vlm-lora (format {manifest.get('format')!r}; this one "
                f"reads {FORMAT}). Resume with that release, or start again with another --output."
            )
        if set(manifest["files"]) != {ADAPTER, OPTIMIZER}:
            raise _Damaged("a file is missing from its list")
        contents = {name: (path / name).read_bytes() for name in manifest["files"]}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                raise _Damaged(f"{name} is not what was written")
        return Progress(**manifest["progress"]), manifest["identity"], contents
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(error.filename).name} is gone") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}), and is left as it is. See that the disk is there and the "
            "files are readable; then continue with --resume."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{MANIFEST} makes no sense: {error}") from error


def _describe(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().contiguous().cpu()  # bitsandbytes counts steps in an int
        for name, parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }


def _shapes(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named}


def _restore_weights(path: Path, parameters: NamedParameters, weights: dict[str, torch.Tensor]) -> None:
    if _shapes(weights.items()) != _shapes(parameters):
        raise CheckpointError(f"{path}: holds other tensors than this run trains.")
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(weights[name])


def _restore_optimizer(parameters: NamedParameters, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    """The manifest vouches that nothing is missing, so a parameter without state is one that had no gradient yet."""
    state = {}
    for index, (name, _) in enumerate(parameters):
        prefix = name + "/"
        state[index] = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if "state1" in state[index]:
            state[index]["step"] = state[index]["step"].item()
    load_optimizer(optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """``load_state_dict``, with the state of a paged optimizer in memory that can be paged out.

    bitsandbytes loads it into plain memory of the device and leaves it there: a run that filled the GPU before it was
    stopped would then no longer fit.
    """
    optimizer.load_state_dict(state_dict)
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in state.keys() & {"state1", "state2"}:
            paged = cast(Any, optimizer).get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = paged.copy_(state[key])
