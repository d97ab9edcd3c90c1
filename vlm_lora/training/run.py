"""A training run from data to adapter: read, split, load, attach, see every image once, train, save."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm_lora.config import TrainConfig, parse_columns, write_yaml
from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow, Dataset, bad_row, read_dataset
from vlm_lora.data.split import split_examples
from vlm_lora.errors import CheckpointError, DataError
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone, load_backbone, require_bitsandbytes
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, cache_folder
from vlm_lora.model.tokens import over_budget
from vlm_lora.training.loop import Lesson, Report, run_steps


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its folder, and what it was trained and is to be evaluated with."""

    folder: Path
    steps: int
    adapter: Adapter
    features: FeatureCache
    train_examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    bad: tuple[BadRow, ...]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    report: Report = lambda kind, **values: None,
    stop: Callable[[], int | None] = lambda: None,
) -> RunResult:
    """Train an adapter and write the run folder.

    Args:
        resume: go on from the newest valid checkpoint of ``config.output``.
        report: called with what happens: ``data``, ``parts``, ``cache``, ``features``, ``start``, ``step``,
            ``held_out``, ``warning``, each with its values.
        stop: asked behind each step; where it gives a signal's number, the run saves and ends with `Stopped`.

    Raises:
        VlmLoraError: data, model, folder or numbers are not right; the message says what to do.
    """
    if config.method == "qlora":
        require_bitsandbytes()
    accelerator = Accelerator()
    dataset = _read(config, config.data)
    held_dataset = _read(config, config.val) if config.val else None
    bad = dataset.bad + (held_dataset.bad if held_dataset else ())
    if not dataset.examples:
        raise DataError(f"{config.data}: no usable example in it. {_listed(bad)}")
    _settle_bad_rows(config, bad)
    if held_dataset:
        train_examples, held_out = list(dataset.examples), list(held_dataset.examples)
    elif config.val_split:
        train_examples, held_out = split_examples(dataset.examples, config.val_split, config.seed)
    else:
        train_examples, held_out = list(dataset.examples), []
    shown = f"{dataset.format} ({dataset.note})" if dataset.note else dataset.format
    report("data", format=shown, train=train_examples, held_out=held_out, bad=bad)

    folder = Path(config.output or _new_run_name(config))
    _prepare_folder(folder, resume)

    backbone = load_backbone(
        config.model,
        dtype=config.dtype,
        device=accelerator.device,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        quantise=config.method == "qlora",
    )
    adapter = attach_adapter(backbone, config)
    report("parts", parts=adapter.parts(), model=config.model, device=str(backbone.device), dtype=str(backbone.dtype))

    features = FeatureCache(backbone, cache_folder() if config.cache else None)
    lessons, bad_lessons = _lessons(config, backbone, features, train_examples, report)
    held_lessons, bad_held = _lessons(config, backbone, features, held_out, report)
    unusable = bad_lessons + bad_held
    if unusable:
        bad += unusable
        _settle_bad_rows(config, bad)
        train_examples = [lesson.example for lesson in lessons]
        held_out = [lesson.example for lesson in held_lessons]
        if not train_examples:
            raise DataError(f"{config.data}: no usable example in it. {_listed(bad)}")
    report("features", computed=features.computed, read=features.read, damaged=features.damaged)

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config.replace(output=str(folder)), folder / "config.yaml")
        _write_quarantine(folder, bad)
    identity = _identity(config, dataset, held_dataset, adapter)
    steps = run_steps(config, adapter, features, lessons, held_lessons, folder, identity, accelerator, report, stop)
    if accelerator.is_main_process:
        adapter.save(folder / "adapter")
    return RunResult(folder, steps, adapter, features, tuple(train_examples), tuple(held_out), tuple(bad))


def _read(config: TrainConfig, path: str) -> Dataset:
    return read_dataset(
        path,
        format=config.format,
        prompt=config.prompt,
        columns=parse_columns(config.columns),
        allow_outside=config.allow_outside,
    )


def _lessons(
    config: TrainConfig, backbone: Backbone, features: FeatureCache, examples: Sequence[Example], report: Report
) -> tuple[list[Lesson], tuple[BadRow, ...]]:
    """Every image through the tower, or out of the cache, and every dialogue in tokens; and what could not be used."""
    encoder = Encoder(backbone)
    lessons: list[Lesson] = []
    bad: list[BadRow] = []
    for done, example in enumerate(examples, start=1):
        try:
            entries = features.get(example.images)
        except DataError as error:
            bad += [bad_row(example, str(error)) for _ in example.dialogues]
            continue
        finally:
            report("cache", done=done, total=len(examples))
        grids = torch.stack([entry.grid_thw for entry in entries]) if entries else torch.zeros(0, 3, dtype=torch.long)
        encoded = encoder.encode(example.dialogues, grids)
        if reason := over_budget(encoded, config.max_tokens):
            bad += [bad_row(example, reason) for _ in example.dialogues]
            continue
        lessons.append(Lesson(example, encoded))
    return lessons, tuple(bad)


def _settle_bad_rows(config: TrainConfig, bad: Sequence[BadRow]) -> None:
    if bad and config.on_bad_row == "stop":
        raise DataError(
            f"{config.data}: {len(bad)} rows cannot be used, and nothing was trained. {_listed(bad)} "
            "Mend them, or leave them out with --on-bad-row quarantine (they are listed in the run folder)."
        )


def _listed(bad: Sequence[BadRow]) -> str:
    told = [f"{row.source}{f':{row.line}' if row.line else ''}: {row.reason}." for row in bad[:5]]
    return " ".join(told) + (f" And {len(bad) - 5} more." if len(bad) > 5 else "")


def _write_quarantine(folder: Path, bad: Sequence[BadRow]) -> None:
    if bad:
        rows = [{"source": row.source, "line": row.line, "reason": row.reason} for row in bad]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "quarantined.jsonl").write_text(text, encoding="utf-8")


def _new_run_name(config: TrainConfig) -> str:
    stem = re.sub(r"[^\w-]+", "-", Path(config.data).resolve().name.split(".")[0]).strip("-") or "data"
    return f"runs/{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _prepare_folder(folder: Path, resume: bool) -> None:
    """Refuse what would overwrite a run, or could not be written, before the model is loaded."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output {folder}: is a file; a run needs a folder.")
    used = folder.is_dir() and any(folder.iterdir())
    if used and not resume:
        raise CheckpointError(
            f"--output {folder}: holds a run already. Go on with it by --resume, or give another folder."
        )
    if resume and not used:
        raise CheckpointError(f"--resume: {folder} holds no run to go on with. Give the run's folder with --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"--output {folder}: cannot be written ({error.strerror}).") from error


def _identity(config: TrainConfig, dataset: Dataset, held: Dataset | None, adapter: Adapter) -> dict:
    """What must be the same for a checkpoint to be gone on with: the data, the base, and every knob of the numbers."""
    free = {"data", "output", "val", "cache", "save_every", "keep_checkpoints", "model"}
    free |= {"columns", "allow_outside"}  # what they change is in the fingerprint of the data
    knobs = {name: value for name, value in config.to_dict().items() if name not in free}
    contract = adapter.contract
    base = hashlib.sha256((contract.base_fingerprint + contract.tower_fingerprint).encode()).hexdigest()[:16]
    return {
        **knobs,
        "data_fingerprint": dataset.fingerprint(),
        "val_fingerprint": held.fingerprint() if held else None,
        "base_fingerprint": base,
    }
