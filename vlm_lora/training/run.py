"""A training run from data to adapter: read, split, load, attach, see the images or make room for them, train, save."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlm_lora.config import TrainConfig, cache_folder
from vlm_lora.data.example import ImageRef
from vlm_lora.data.examples import Examples
from vlm_lora.data.index import Looks
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import TrainingError
from vlm_lora.model.adapters.base import Adapter, find_adapter
from vlm_lora.model.backbone import Backbone, load_backbone, require_bitsandbytes
from vlm_lora.model.device import in_one_order, is_out_of_memory, peak_memory, process_peak, resolve_dtype
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.training.batches import Loader
from vlm_lora.training.compiled import is_compiled
from vlm_lora.training.cost import Measured, Prediction, cost_model, predict
from vlm_lora.training.events import Events
from vlm_lora.training.folder import (
    RunFolder,
    locked,
    new_run_name,
    newest_unfinished,
    prepare_folder,
    require_room,
)
from vlm_lora.training.lessons import Lessons
from vlm_lora.training.loop import Captions, TrainingLoop
from vlm_lora.training.prepare import (
    Prepared,
    SplitData,
    count_tokens,
    make_room,
    no_usable_example,
    read_and_split,
    require_usable,
    see_images,
    sees_each_image_once,
    takes_images_as_they_come,
)
from vlm_lora.training.processes import Processes
from vlm_lora.training.step import OUT_OF_MEMORY
from vlm_lora.training.techniques import ALL, Techniques
from vlm_lora.training.tracker import require_tracker, tracked


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A run that is trained: its folder, and what it was trained and is to be evaluated with."""

    folder: Path
    steps: int
    adapter: Adapter
    features: FeatureCache
    train_examples: Examples
    held_out: Examples
    bad: tuple[BadRow, ...]
    fingerprint: str
    """Of the data it was trained on."""
    processes: Processes


def train_adapter(
    config: TrainConfig,
    *,
    resume: bool = False,
    allow_change: Collection[str] = (),
    events: Events | None = None,
    stop: Callable[[], int | None] = lambda: None,
    techniques: Techniques = ALL,
    watch: Callable[[Adapter, FeatureCache], Captions] | None = None,
) -> TrainedAdapter:
    """Train an adapter and write the run folder.

    Args:
        resume: from the newest valid checkpoint of ``config.output``, or else of this data's newest run in ``runs``
            that has not ended. Where ``config.output`` is not there yet, it starts from the beginning, and says so.
        allow_change: settings, or ``data``, ``val``, ``base``, that may differ from the checkpoint's.
        events: its methods are called, in every process, with what happens.
        stop: asked after each step; where it gives a signal's number, the run saves and ends with `Stopped`.
        techniques: what may be exchanged, to measure what it brings.
        watch: gives what captions the held-out images of ``config.watch`` while it trains.

    Raises:
        VlmLoraError: data, model, folder or numbers are not right; the message says what to do.
    """
    events = events or Events()
    if config.method == "qlora":
        require_bitsandbytes()
    require_tracker(config.report_to)
    path = Path(config.output or (newest_unfinished(config) if resume else new_run_name(config)))
    processes = Processes(config.method, log_with=config.report_to, project_dir=str(path))
    config = config.on(processes.device.type)
    data = read_and_split(config, events.looks, events.warning)
    # Or they would wait for each other for ever, from here on
    processes.require_same({"data": data.fingerprint, "val": data.val_fingerprint})
    require_usable(config, data.bad_rows)
    events.data(data.taken_for, data.train, data.held_out, data.bad_rows)
    config = config.replace(system=_system(config, data.systems, events))

    with ExitStack() as held, _memory_advice(), in_one_order() if config.deterministic else nullcontext():
        path = processes.on_main(lambda: _open_folder(path, resume, held, events))
        events.folder(path)
        processes.on_main(lambda: held.enter_context(tracked(config, processes.accelerator, path, resume)))
        adapter = _attached(config, processes, techniques.attach)
        events.parts(adapter, config.model)
        features = _feature_cache(config, adapter, techniques, data.looks, events)
        prepared, as_they_come = _prepare(config, data, features, processes, events)
        processes.on_main(lambda: require_room(path, adapter, config))
        # The tower's memory is the training's, if it can be.
        features.park_tower(prepared.images)
        identity = _identity(config, data, adapter) | {"pictures_fingerprint": features.fingerprint(prepared.images)}
        processes.require_same(identity)
        folder = RunFolder(path, identity, processes, config.report_to)
        there, kept = (features.share_kept(prepared.train.images, expected) for expected in (False, as_they_come))
        started = time.perf_counter()
        loader = Loader(adapter.backbone, features, processes, techniques, as_they_come)
        loop = TrainingLoop(config, adapter, loader, prepared, folder, events, stop)
        _prepare_layers(config, adapter.backbone, processes.sharded, loop.schedule.num_steps, events)
        steps = loop.run(allow_change, watch and watch(adapter, features))
        damaged = tuple(BadRow(*row) for row in loop.progress.damaged)
        train, held_out = (_without(damaged, side.learnt_from) for side in (prepared.train, prepared.held_out))
        bad = (*prepared.bad_rows, *damaged)
        if not train:
            raise no_usable_example(config, bad)

        def save() -> None:
            folder.save_adapter(adapter)
            if steps == loop.schedule.num_steps and not loop.first:  # else not all that is predicted was timed
                measured = _measured(loop, started)
                _report_cost(loop, _predicted(loop, there, kept), measured, started)

        processes.on_main(save)
    return TrainedAdapter(path, steps, adapter, features, train, held_out, bad, data.fingerprint, processes)


def _without(damaged: Collection[BadRow], examples: Examples) -> Examples:
    """The examples, but for those of damaged rows."""
    places = {row.place for row in damaged}
    if not places:
        return examples
    return examples.take([i for i, each in enumerate(examples) if places.isdisjoint(d.place for d in each.dialogues)])


def _system(config: TrainConfig, systems: Sequence[str], events: Events) -> str | None:
    """The system prompt that the adapter will be asked with: what all rows have in common."""
    if len(systems) > 1 and config.system is None:
        events.warning(
            f"The data has {len(systems)} different system prompts. The adapter will be asked without one, unless "
            "--system says which."
        )
    return config.system or (systems[0] if len(systems) == 1 else "") or None


def _open_folder(path: Path, resume: bool, held: ExitStack, events: Events) -> Path:
    if resume and not path.exists():  # what restarts a job by itself says --resume the first time too
        events.warning(f"--resume: there is no run in {path} yet; it starts from the beginning.")
    made = prepare_folder(path, resume)
    held.enter_context(locked(path, made))
    return path


def _attached(config: TrainConfig, processes: Processes, attach: Callable[[Backbone, TrainConfig], Adapter]) -> Adapter:
    """The adapter on its base model, ready to train."""
    backbone = load_backbone(
        config.model,
        dtype=str(resolve_dtype(config.dtype, processes.device)).removeprefix("torch."),
        device=torch.device("cpu") if processes.sharded else processes.device,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        quantise=config.method == "qlora",
    )
    adapter = attach(backbone, config)
    if config.from_:
        adapter = adapter.going_on_from(Path(config.from_).resolve().name, find_adapter(config.from_))
    if processes.sharded:
        backbone.shard(processes.group, processes.device)
    return adapter


def _prepare_layers(config: TrainConfig, backbone: Backbone, sharded: bool, steps: int, events: Events) -> None:
    """Have the language layers compute as they are to in training."""
    if is_compiled(config, backbone, sharded, steps, events):
        backbone.compile_layers()
    if config.gradient_checkpointing:  # around what is compiled
        backbone.checkpoint_layers()


def _feature_cache(
    config: TrainConfig, adapter: Adapter, techniques: Techniques, looks: Looks, events: Events
) -> FeatureCache:
    if adapter.backbone.tower_adapted:
        events.warning("LoRA is in the vision tower, so it runs in each step for each image, and no features are kept.")
    folder = cache_folder() if config.cache else None
    return FeatureCache(
        adapter.backbone,
        folder,
        limit_gb=config.cache_gb,
        warn=events.warning,
        in_memory=techniques.features_in_memory,
        looks=looks,
    )


def _prepare(
    config: TrainConfig, data: SplitData, features: FeatureCache, processes: Processes, events: Events
) -> tuple[Prepared, bool]:
    """The examples, their tokens counted, and whether their images are taken as they come; else they were seen. Bad
    rows stop it as early as they are known."""
    prepared = count_tokens(config, data, Encoder(features.backbone), events.tokens)
    require_usable(config, prepared.bad_rows)  # what is too long is known before hours in the tower
    seen_once = sees_each_image_once(config, data.train)
    as_they_come = takes_images_as_they_come(config, prepared)
    if as_they_come:
        make_room(prepared, features, processes, seen_once, events)
    else:
        prepared = see_images(prepared, features, processes, seen_once, events)
    require_usable(config, prepared.bad_rows)
    if not prepared.train:
        raise no_usable_example(config, prepared.bad_rows)
    return prepared, as_they_come


def _identity(config: TrainConfig, data: SplitData, adapter: Adapter) -> dict:
    """What must be the same for a checkpoint to be resumed from: the data, the base, and every knob of the numbers."""
    contract = adapter.contract
    assert contract is not None, "an adapter that was attached here has one"
    base = hashlib.sha256((contract.base_fingerprint + contract.tower_fingerprint).encode()).hexdigest()[:16]
    fingerprints = {"data": data.fingerprint, "val": data.val_fingerprint, "base": base}
    return config.identity | {f"{name}_fingerprint": value for name, value in fingerprints.items()}


def _patches(features: FeatureCache, examples: Lessons) -> dict[ImageRef, int]:
    return {image: features.patches(image) for image in examples.images}


def _measured(loop: TrainingLoop, started: float) -> Measured:
    used, reserved = peak_memory(loop.backbone.device) or (None, None)
    process = process_peak() if used is None else None
    return Measured(time.perf_counter() - started, loop.processes.count, used, reserved, process)


def _predicted(loop: TrainingLoop, there: float, kept: float) -> Prediction:
    """After the steps, from what was known before them: no run waits for it."""
    config, prepared, features, backbone = loop.config, loop.data, loop.loader.features, loop.backbone
    return predict(
        config.replace(micro_batch_tokens=loop.progress.micro_batch_tokens),
        cost_model(config, backbone.dtype, backbone.device.type),
        prepared.weighted,
        _patches(features, prepared.train),
        gpus=loop.processes.count,
        sharded=loop.processes.sharded,
        kept=kept,
        there=there,
        held_out=loop.held_out,
        held_patches=_patches(features, prepared.held_out),
    )


def _report_cost(loop: TrainingLoop, predicted: Prediction, measured: Measured, started: float) -> None:
    """What was predicted beside what was measured, also as the last line of metrics.jsonl."""
    config, folder = loop.config, loop.folder
    seconds, ends = None, loop.step_ends
    if predicted.steps > 3 and config.save_every > 2:  # else there is nothing to predict, or a pause in what is timed
        seconds = ends[2] - started + predicted.seconds_left(ends[2] - ends[0])
    loop.events.cost(predicted, seconds, measured)
    memory = {"memory": predicted.memory, "memory_by_part": predicted.memory_by_part}
    numbers = asdict(predicted) | memory | {"seconds": seconds}
    folder.append_to_log({"step": predicted.steps, "predicted": numbers, "measured": measured.to_json()})


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Out of memory where nothing can be halved, as in the tower or the held-out loss, ends in advice too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(OUT_OF_MEMORY) from error
