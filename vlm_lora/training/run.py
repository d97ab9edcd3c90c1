"""A training run from data to adapter: read, split, load, attach, see every image once, train, save."""

import hashlib
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow, Dataset, bad_rows
from vlm_lora.data.split import split_examples, without_held_out
from vlm_lora.errors import CheckpointError, ConfigError, DataError, TrainingError
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone, load_backbone, require_bitsandbytes
from vlm_lora.model.device import is_out_of_memory, resolve_dtype
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, cache_folder
from vlm_lora.model.shapes import Shapes, shapes_of
from vlm_lora.model.tokens import encode_fitting
from vlm_lora.training.checkpoint import LOCK, locked, writing
from vlm_lora.training.loop import OUT_OF_MEMORY, Lesson, Report, run_steps
from vlm_lora.training.plan import Prediction, predict, read_data, sees_each_image_once
from vlm_lora.training.processes import Processes


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
    fingerprint: str
    """Of the data it was trained on."""
    processes: Processes


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    allow_change: Collection[str] = (),
    report: Report = lambda kind, **values: None,
    stop: Callable[[], int | None] = lambda: None,
) -> RunResult:
    """Train an adapter and write the run folder.

    Args:
        resume: go on from the newest valid checkpoint of ``config.output``, or else of this data's newest run in
            ``runs`` that has not ended.
        allow_change: settings, or ``data``, ``val``, ``base``, that may differ from the checkpoint's.
        report: called in every process with what happens: ``data``, ``folder``, ``parts``, ``tokens``, ``survey``,
            ``cache``, ``start``, ``step``, ``held_out``, ``best``, ``cost``, ``warning``, each with its values.
        stop: asked behind each step; where it gives a signal's number, the run saves and ends with `Stopped`.

    Raises:
        VlmLoraError: data, model, folder or numbers are not right; the message says what to do.
    """
    if config.method == "qlora":
        require_bitsandbytes()
    if config.report_to and config.report_to not in map(str, get_available_trackers()):
        raise ConfigError(f"--report-to {config.report_to}: is not installed: pip install {config.report_to}.")
    folder = Path(config.output or (_newest_unfinished(config) if resume else _new_run_name(config)))
    processes = Processes(config.method, log_with=config.report_to, project_dir=str(folder))
    config = config.on(processes.device.type)
    dataset = read_data(config, config.sources)
    held_dataset = read_data(config, (config.val,)) if config.val else None
    if held_dataset:
        dataset = without_held_out(dataset, held_dataset, config.val)
    same = {"data": dataset.fingerprint(), "val": held_dataset and held_dataset.fingerprint()}
    processes.require_same(same)  # or they would wait for each other for ever, from here on
    bad = dataset.bad + (held_dataset.bad if held_dataset else ())
    if not dataset.examples:
        raise DataError(f"{', '.join(config.sources)}: no usable example in it. {_listed(bad)}")
    _settle_bad_rows(config, bad)
    if held_dataset:
        train_examples, held_out = list(dataset.examples), list(held_dataset.examples)
    elif config.val_split:
        train_examples, held_out = split_examples(dataset.examples, config.val_split, config.seed)
    else:
        train_examples, held_out = list(dataset.examples), []
    report(
        "data", format=". ".join(dataset.parts) or dataset.taken_for, train=train_examples, held_out=held_out, bad=bad
    )

    with ExitStack() as held, _memory_advice():

        def take() -> Path:
            _prepare_folder(folder, resume)
            held.enter_context(locked(folder))
            return folder

        folder = processes.on_main(take)
        report("folder", folder=folder)
        processes.on_main(lambda: held.enter_context(_tracked(config, processes.accelerator, folder, resume)))
        backbone = load_backbone(
            config.model,
            dtype=str(resolve_dtype(config.dtype, processes.device)).removeprefix("torch."),
            device=torch.device("cpu") if processes.sharded else processes.device,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            quantise=config.method == "qlora",
        )
        shapes = shapes_of(backbone.model)
        adapter = attach_adapter(backbone, config)
        if config.gradient_checkpointing:
            backbone.checkpoint_layers()
        if processes.sharded:
            backbone.shard(processes.group, processes.device)
        report(
            "parts", parts=adapter.parts(), model=config.model, device=str(backbone.device), dtype=str(backbone.dtype)
        )

        if backbone.tower_adapted:
            text = "LoRA sits in the vision tower, so it runs in each step for each image, and no features are kept."
            report("warning", text=text)
        features = FeatureCache(
            backbone,
            cache_folder() if config.cache else None,
            limit_gb=config.cache_gb,
            warn=lambda text: report("warning", text=text),
        )
        # Held-out images are seen again and again, at every save; training images once an epoch.
        seen_once = sees_each_image_once(config, train_examples)
        lessons, bad_texts = _lessons(config, backbone, features, train_examples, report)
        held_lessons, bad_held_texts = _lessons(config, backbone, features, held_out, report)
        bad += bad_texts + bad_held_texts
        _settle_bad_rows(config, bad)  # what is too long is known before hours in the tower
        lessons, bad_images = _with_images(features, lessons, processes, seen_once, report)
        held_lessons, bad_held_images = _with_images(features, held_lessons, processes, False, report)
        features.write = not seen_once
        bad += bad_images + bad_held_images
        _settle_bad_rows(config, bad)
        train_examples = [lesson.example for lesson in lessons]
        held_out = [lesson.example for lesson in held_lessons]
        if not train_examples:
            raise DataError(f"{', '.join(config.sources)}: no usable example in it. {_listed(bad)}")
        processes.on_main(lambda: _require_room(folder, adapter, config))
        # The tower's memory is the training's, if it can be.
        features.park_tower(image for example in (*train_examples, *held_out) for image in example.images)

        def describe() -> None:
            with writing(folder):
                _write_quarantine(folder, bad)

        processes.on_main(describe)
        identity = _identity(config, dataset, held_dataset, adapter)
        processes.require_same(identity)
        lessons = [lesson for lesson in lessons for _ in range(lesson.example.weight)]
        predicted, started = _prediction(config, shapes, features, lessons, processes), time.perf_counter()
        ended: list[float] = []  # when each of the first steps did

        def clock(kind: str, **values) -> None:
            if kind == "step" and values["step"] <= 3:
                ended.append(time.perf_counter())
            report(kind, **values)

        steps = run_steps(
            config, adapter, features, lessons, held_lessons, folder, identity, processes, clock, stop, allow_change
        )

        def save() -> None:
            with writing(folder / "adapter"):
                adapter.save(folder / "adapter")
            if steps == predicted.steps and not resume:  # else the work that was timed is not what was planned
                measured = {"seconds": time.perf_counter() - started, "devices": processes.count}
                if backbone.device.type == "cuda":
                    measured["memory_bytes"] = torch.cuda.max_memory_allocated(backbone.device)
                seconds = None
                if steps > 3 and config.save_every > 2:  # else there is nothing to predict, or a pause in what is timed
                    seconds = ended[2] - started + predicted.seconds_left(ended[2] - ended[0])
                report("cost", predicted=predicted, seconds=seconds, measured=measured)
                told = asdict(predicted) | {"memory": predicted.memory, "seconds": seconds}
                line = {"predicted": told, "measured": measured}
                with writing(folder / "metrics.jsonl"), (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": steps} | line) + "\n")

        processes.on_main(save)
        examples = tuple(train_examples), tuple(held_out)
        fingerprint = identity["data_fingerprint"]
        return RunResult(folder, steps, adapter, features, *examples, tuple(bad), fingerprint, processes)


def _lessons(
    config: TrainConfig, backbone: Backbone, features: FeatureCache, examples: Sequence[Example], report: Report
) -> tuple[list[Lesson], tuple[BadRow, ...]]:
    """Every dialogue in tokens, and the rows that cannot be; of the images the headers alone are looked at."""
    encoder = Encoder(backbone)
    lessons: list[Lesson] = []
    bad: list[BadRow] = []
    for done, example in enumerate(examples, start=1):
        report("tokens", done=done, total=len(examples))
        try:
            grids = [features.grid(image) for image in example.images]
        except DataError as error:
            bad += bad_rows(example, str(error))
            continue
        grid = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
        fitting, too_long = encode_fitting(encoder, example, grid, config.max_tokens)
        lessons += [Lesson(*fitting)] if fitting else []
        bad += too_long
    return lessons, tuple(bad)


def _with_images(
    features: FeatureCache, lessons: Sequence[Lesson], processes: Processes, seen_once: bool, report: Report
) -> tuple[list[Lesson], tuple[BadRow, ...]]:
    """The lessons whose images are whole, and the rows of the others; features in the cache, if they are to be."""
    features.write = not seen_once
    if images := [image for lesson in lessons for image in lesson.example.images]:
        report("survey", survey=features.survey(images), folder=features.folder, seen_once=seen_once)
    whole: list[Lesson] = []
    bad: list[BadRow] = []
    at_once = 32 * processes.count if processes.count > 1 else 1
    for start in range(0, len(lessons), at_once):
        some = lessons[start : start + at_once]
        # The tower's work is shared out; what is wrong with an image goes to every process.
        parts = processes.gather(
            [_prepare(features, each.example) for each in some[processes.index :: processes.count]]
        )
        for i, lesson in enumerate(some):
            if error := parts[i % processes.count][i // processes.count]:
                bad += bad_rows(lesson.example, error)
            else:
                whole.append(lesson)
        report("cache", done=start + len(some), total=len(lessons))
    return whole, tuple(bad)


def _prepare(features: FeatureCache, example: Example) -> str:
    """Make its images ready; what is wrong with one of them, or ""."""
    try:
        for image in example.images:
            features.prepare(image)
    except DataError as error:
        return str(error)
    return ""


def _prediction(
    config: TrainConfig, shapes: Shapes, features: FeatureCache, lessons: Sequence[Lesson], processes: Processes
) -> Prediction:
    """The cost of the steps alone: what the cache holds by now costs nothing more."""
    patches = {image: features.patches(image) for lesson in lessons for image in lesson.example.images}
    survey = features.survey(patches)
    return predict(
        config,
        shapes,
        [(lesson.example, lesson.encoded) for lesson in lessons],
        patches,
        device=features.backbone.device,
        gpus=processes.count,
        sharded=processes.sharded,
        kept=1 - survey.missing_bytes / max(1, survey.num_bytes),
    )


def _settle_bad_rows(config: TrainConfig, bad: Sequence[BadRow]) -> None:
    if bad and config.on_bad_row == "stop":
        check = ["vlm-lora", "check", *config.sources, "--model", config.model, *config.row_flags]
        raise DataError(
            f"{', '.join(config.sources)}: {len(bad)} rows cannot be used, and nothing was trained. {_listed(bad)} "
            f"Mend them ({shlex.join(check)} lists all), or leave them out with --on-bad-row quarantine "
            "(they are listed in the run folder)."
        )


def _listed(bad: Sequence[BadRow]) -> str:
    told = [f"{row.source}{f':{row.line}' if row.line else ''}: {row.reason}." for row in bad[:5]]
    return " ".join(told) + (f" And {len(bad) - 5} more." if len(bad) > 5 else "")


def _write_quarantine(folder: Path, bad: Sequence[BadRow]) -> None:
    if bad:
        rows = [{"source": row.source, "line": row.line, "reason": row.reason} for row in bad]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # Names that are no UTF-8 as JSON writes them
        (folder / "quarantined.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")


def _run_stem(config: TrainConfig) -> str:
    return re.sub(r"[^\w-]+", "-", Path(config.sources[0]).resolve().name.split(".")[0]).strip("-") or "data"


def _new_run_name(config: TrainConfig) -> str:
    return f"runs/{_run_stem(config)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _newest_unfinished(config: TrainConfig) -> Path:
    """The run that ``--resume`` without ``--output`` means: of those that `_new_run_name` has named."""
    name = re.compile(re.escape(_run_stem(config)) + r"-\d{8}-\d{6}")
    begun = [p for p in Path("runs").glob("*") if name.fullmatch(p.name) and not (p / "adapter").exists()]
    if not begun:
        raise CheckpointError(
            f"--resume: runs/ holds no unfinished run of {', '.join(config.sources)}. Give its folder with --output."
        )
    return max(begun)


def _prepare_folder(folder: Path, resume: bool) -> None:
    """Refuse what would overwrite a run, or could not be written, before the model is loaded."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output {folder}: is a file; a run needs a folder.")
    used = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if used and not resume:
        raise CheckpointError(
            f"--output {folder}: holds a run already. Go on with it by --resume, or give another folder."
        )
    if resume and not folder.exists():  # an empty one is that of a run killed before anything was written
        raise CheckpointError(f"--resume: there is no folder {folder} to go on with. Give the run's with --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"--output {folder}: cannot be written ({error.strerror}).") from error


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Out of memory where nothing can be halved, as in the tower or the held-out loss, ends in advice too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(OUT_OF_MEMORY) from error


def _require_room(folder: Path, adapter: Adapter, config: TrainConfig) -> None:
    """Refuse a disk that the checkpoints would fill: each holds the adapter's tensors and twice that of AdamW's."""
    adapter_bytes = sum(parameter.nbytes for _, parameter in adapter.named_parameters())
    needed = adapter_bytes * (3 * (config.keep_checkpoints + 2) + 1)  # with the best, one being written, the adapter
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"--output {folder}: {free / 2**20:,.0f} MiB are free on this disk, the run's checkpoints need "
            f"{needed / 2**20:,.0f} MiB. Make room, keep fewer with --keep-checkpoints, or give another --output."
        )


@contextmanager
def _tracked(config: TrainConfig, accelerator: Accelerator, folder: Path, resume: bool) -> Iterator[None]:
    """Inside, what is logged goes to the tracker too. It starts before the model is loaded, so that it is not found out
    hours later that nobody is logged in.

    A run that is gone on with goes on in the tracker: Weights & Biases notes in the run folder which of its runs that
    is, and forgets it when the run has ended well.
    """
    if config.report_to is None:
        yield
        return
    own = {
        "wandb": {"name": folder.name, "dir": str(folder), "resume": "auto"},
        "trackio": {"name": folder.name, "resume": "allow" if resume else "never"},
    }
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    settings["data"] = ", ".join(config.sources)  # TensorBoard takes no tuple
    # TensorBoard is given a folder and takes the name as one in it; the others know projects that hold runs.
    project = "tensorboard" if config.report_to == "tensorboard" else "vlm-lora"
    # trackio prints where results go; wandb would keep each line twice if that were turned round for it too.
    aside = redirect_stdout(sys.stderr) if config.report_to == "trackio" else nullcontext()
    try:
        with aside:
            accelerator.init_trackers(project, settings, {config.report_to: own.get(config.report_to, {})})
    except Exception as error:  # each tracker has classes of its own
        raise ConfigError(
            f"--report-to {config.report_to}: could not be started ({' '.join(str(error).split())}). Settle that and "
            "go on with --resume, or leave --report-to out."
        ) from error
    well = False
    try:
        yield
        well = True
    finally:
        with aside:
            if config.report_to == "wandb":  # else the next run in this Python program would be logged as this one
                accelerator.get_tracker("wandb", unwrap=True).finish(exit_code=0 if well else 1)
            elif well:
                accelerator.trackers[0].finish()  # and not end_training, which would also part the processes


def _identity(config: TrainConfig, dataset: Dataset, held: Dataset | None, adapter: Adapter) -> dict:
    """What must be the same for a checkpoint to be gone on with: the data, the base, and every knob of the numbers."""
    contract = adapter.contract
    base = hashlib.sha256((contract.base_fingerprint + contract.tower_fingerprint).encode()).hexdigest()[:16]
    return {
        **config.identity,
        "data_fingerprint": dataset.fingerprint(),
        "val_fingerprint": held.fingerprint() if held else None,
        "base_fingerprint": base,
    }
