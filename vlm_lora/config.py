"""Every knob of a training run, once: name, default, unit, help, bounds, and who reads it.

Flags, `--help`, YAML, validation, what other commands take over from a run, and what must stay the same when a run is
resumed all follow from the fields of `TrainConfig`.
"""

import math
import os
import re
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from vlm_lora.errors import ConfigError

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEFAULT_PROMPT = "Describe this image."
DEFAULT_MAX_NEW_TOKENS = 64
DEFAULT_CACHE_GB = 50.0
DEFAULT_EVAL_IMAGES = 200
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_TOKENS = 4096
"""Of a micro-batch on what is no CPU: the least on a GPU, where memory and data decide (training/fitting.py)."""
LOOKED_AT_FIRST = 2000
"""Images that are all looked at before the first step, where --validate-first does not say otherwise: so few take a GPU
less than a minute, and every fault is known before anything is trained."""
COMPILED_FROM = 1000
"""Steps of a run that repay compiling: 89 seconds on the host of an H200, where a step of 2B took 0.37 seconds after
it, and 0.56 before (bench/results/gpu-2b.json)."""

CACHE_VARIABLE = "VLM_LORA_CACHE"

METHODS = ("lora", "qlora", "adapter", "prompt", "prefix")
LORA = ("lora", "qlora")
PARTS = ("language", "projector", "vision")
SHAPING = ("method", "variant", "targets", "rank", "alpha", "projector_rank", "projector_alpha", "bottleneck")
SHAPING += ("num_virtual_tokens",)
"""The knobs that decide which tensors an adapter has, and what they stand for."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What may be the name of a model or adapter on the hub: two words with a slash."""
GROUPS = ("data", "model", "method", "training", "memory", "run")
"""The headings of ``--help``."""
EVERYDAY = (
    "data", "prompt", "val", "val_split", "on_bad_row", "model", "max_pixels", "from_", "method", "rank", "epochs",
    "max_steps", "batch_size", "lr", "load_best_at_end", "micro_batch_tokens", "output", "save_every",
)  # fmt: skip
"""The knobs that ``--help`` shows; ``--help-all`` shows all of them."""
ELSEWHERE = {
    "adapter_name_or_path": "from_", "base_model": "model", "bf16": "dtype", "cutoff_len": "max_tokens",
    "data_path": "data", "dataset": "data", "dataset_name": "data", "early_stopping_patience": "patience",
    "finetuning_type": "method", "fp16": "dtype", "gradient_accumulation_steps": "batch_size",
    "image_max_pixels": "max_pixels", "instruction": "prompt", "learning_rate": "lr",
    "load_best_model_at_end": "load_best_at_end", "load_in_4bit": "method", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "lora_r": "rank", "lora_rank": "rank", "lora_target": "targets",
    "lr_warmup_steps": "warmup", "max_length": "max_tokens", "max_seq_length": "max_tokens",
    "max_train_epochs": "epochs", "max_train_steps": "max_steps", "mixed_precision": "dtype",
    "model_id": "model", "model_name_or_path": "model", "network_alpha": "alpha", "network_dim": "rank",
    "num_train_epochs": "epochs", "output_dir": "output", "peft_type": "method",
    "per_device_train_batch_size": "batch_size", "pretrained_model_name_or_path": "model",
    "quantization_bit": "method", "r": "rank", "resolution": "max_pixels", "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints", "split_dataset_ratio": "val_split", "system_prompt": "system",
    "target_modules": "targets", "torch_compile": "compile", "torch_dtype": "dtype", "train_data_dir": "data",
    "train_type": "method", "tuner_type": "method", "val_dataset": "val", "val_size": "val_split",
    "warmup_ratio": "warmup", "warmup_steps": "warmup",
}  # fmt: skip
"""What other tools call a knob: whoever uses their word is told ours."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers a knob may have: from ``low`` to ``high``; ``above`` and ``below`` leave out the ends themselves."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = True

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            finite = "a finite number" if self.below else "a number"
            return f"{finite} above {self.low:g}" if self.above else f"{finite}, {self.low:g} or more"
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {'below ' * self.below}{self.high:g}"


POSITIVE = Bounds(0, above=True)
COUNT = Bounds(1)
PROBABILITY = Bounds(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """What is known of a field of `TrainConfig`."""

    help: str
    group: str
    choices: tuple[str, ...] = ()
    bounds: Bounds | None = None
    methods: tuple[str, ...] = METHODS
    """Where it has a meaning. Given with another method it is refused, unless it has its default value: a run's
    config.yaml, which may be given again, names every knob."""
    reads: bool = False
    """Whether it decides how rows are read: every command that reads data has a flag for it, and who reads the data of
    a run again takes it from there."""
    decides_rows: bool = False
    """Whether it decides which rows are bad: `check` has a flag for it."""
    identity: bool = True
    """Whether it must stay the same for a checkpoint to be resumed from."""
    name: str = ""
    kind: type = str
    default: Any = None

    @property
    def flag(self) -> str:
        return flag_of(self.name)


def flag_of(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # from_, as Python has a word of its own for the other


def knob(default: Any, help: str, group: str, **more: Any) -> Any:
    return field(default=default, metadata={"knob": Knob(help=help, group=group, **more)})


def _data(default: Any, help: str, **more: Any) -> Any:
    """A knob of the data; what most of them change is in the data's fingerprint, which is part of the identity."""
    return knob(default, help, "data", **({"identity": False, "reads": True, "decides_rows": True} | more))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The settings of a training run. All but ``data`` have a default.

    Each is a flag of ``vlm-lora train`` too, with ``-`` for ``_``: ``batch_size`` is ``--batch-size``. Errors name the
    flag. Folders and files can be given as text or as a `Path`.

    Raises:
        ConfigError: a value is of the wrong type or out of bounds, or two settings do not go together.
    """

    data: str | tuple[str, ...] = field(
        metadata={
            "knob": Knob(
                help="folder or file with images and captions, or questions and answers. Several may be given; DATA:2 "
                "counts DATA twice per epoch",
                group="data",
                identity=False,
            )
        }
    )
    format: str | None = _data(None, "format of the data (default: detected)", identity=True)
    columns: str | None = _data(
        None,
        "names of your columns, as image=NAME,caption=NAME (also question, answer, kind, system, weight, split)",
    )
    ignore_columns: str = _data("", "columns to ignore that would otherwise make a row bad, separated by commas")
    text_as_is: bool = _data(False, "read marks of other tools in texts (<video>, <|image_1|>) as plain letters")
    images: str | None = _data(None, "folder to search for images that are not beside the data")
    allow_outside: bool = _data(False, "trust the data: allow images outside of its folder, through .. or symlinks")
    allow_urls: bool = _data(
        False, "download images from http:// and https:// addresses in the data; public addresses only"
    )
    prompt: str = _data(DEFAULT_PROMPT, "the instruction that a caption answers", identity=True)
    system: str | None = _data(None, "system prompt for rows that have none; it is used for captioning too")
    train_on: str = _data("all", "which answers of a conversation are learnt", choices=("last", "all"))
    json_boxes: str = _data(
        "as-is", "unit of the numbers of bbox_2d and point_2d in texts, to convert them to the model's; real: pixels",
        choices=("as-is", "real", "norm1", "norm1000"),
    )  # fmt: skip
    val: str | None = _data(None, "held-out data of your own, instead of a part split off", reads=False)
    val_split: float = _data(
        0.1, "fraction of the images to hold out when --val is not given; 0 holds out none", bounds=PROBABILITY,
        identity=True, reads=False, decides_rows=False,
    )  # fmt: skip
    on_bad_row: str = _data(
        "stop", "rows that cannot be used: stop, or train without them and list them (quarantine)",
        choices=("stop", "quarantine"), identity=True, reads=False, decides_rows=False,
    )  # fmt: skip
    validate_first: str = _data(
        "auto", "look at every image, and compute its features, before the first step; auto: if there are at most "
        f"{LOOKED_AT_FIRST:,}. Else a damaged image is found when its turn comes",
        choices=("auto", "yes", "no"), reads=False, decides_rows=False,
    )  # fmt: skip
    max_tokens: int = _data(
        4096, "longest image-and-answer sequence, in tokens; longer ones are bad rows", bounds=Bounds(16),
        identity=True, reads=False,
    )  # fmt: skip

    model: str = knob(
        DEFAULT_MODEL, "base model: hub name, local folder, or 'tiny' (embedded, needs no network)", "model",
        identity=False,  # its weights' fingerprint is what counts
    )  # fmt: skip
    dtype: str = knob(
        "auto",
        "number format of the base; auto: on a GPU bfloat16, or float16 where it has no bfloat16; else float32",
        "model", choices=DTYPES,
    )  # fmt: skip
    min_pixels: int | None = knob(
        None, "smallest image area in pixels (default: the model's own)", "model",
        bounds=COUNT, decides_rows=True,
    )  # fmt: skip
    max_pixels: int | None = knob(
        None, "largest image area in pixels; less saves memory and time (default: the model's own)", "model",
        bounds=COUNT, decides_rows=True,
    )  # fmt: skip

    from_: str | None = knob(
        None,
        "start from the adapter of this run, with a new schedule; base, prompt, method and sizes are taken from it",
        "method",
    )  # fmt: skip
    method: str = knob("lora", "fine-tuning method", "method", choices=METHODS)
    variant: str | None = knob(
        None, "LoRA variant (default: plain)", "method", choices=("plain", "rslora", "dora", "pissa"), methods=LORA
    )
    targets: str | None = knob(
        None,
        "parts that LoRA adapts, separated by commas: language, projector, vision (default: language,projector). With "
        "vision, every step runs the vision tower, and nothing is cached",
        "method",
        methods=LORA,
    )
    rank: int = knob(16, "LoRA rank: how much the adapter can hold", "method", bounds=COUNT, methods=LORA)
    alpha: float | None = knob(None, "LoRA alpha (default: twice the rank)", "method", bounds=POSITIVE, methods=LORA)
    projector_rank: int | None = knob(
        None, "LoRA rank of the projector (default: --rank)", "method", bounds=POSITIVE, methods=LORA
    )
    projector_alpha: float | None = knob(
        None, "LoRA alpha of the projector (default: --alpha, scaled to its rank)", "method",
        bounds=POSITIVE, methods=LORA,
    )  # fmt: skip
    projector_lr: float | None = knob(
        None, "peak learning rate of the projector's LoRA (default: --lr)", "method", bounds=POSITIVE, methods=LORA
    )
    dropout: float = knob(0.0, "LoRA dropout, a probability", "method", bounds=PROBABILITY, methods=LORA)
    bottleneck: int = knob(
        16, "width of the adapters of --method adapter", "method", bounds=COUNT, methods=("adapter",)
    )
    num_virtual_tokens: int = knob(
        16, "trained vectors (--method prompt) or pairs a layer (--method prefix)", "method",
        bounds=COUNT, methods=("prompt", "prefix"),
    )  # fmt: skip

    epochs: float = knob(3.0, "passes over the training answers", "training", bounds=POSITIVE)
    max_steps: int | None = knob(
        None, "stop after N optimizer steps at the latest; does not lengthen --epochs", "training", bounds=COUNT
    )
    batch_size: int = knob(
        16, "answers per optimizer step, about; all answers of an image stay in one step",
        "training", bounds=COUNT,
    )  # fmt: skip
    lr: float = knob(
        2e-4, "peak learning rate; if the result is poor, try a third and three times", "training", bounds=POSITIVE
    )
    warmup: float = knob(
        0.05, "fraction of the steps over which the learning rate rises", "training", bounds=Bounds(0, 1, below=False)
    )
    weight_decay: float = knob(0.0, "AdamW weight decay", "training", bounds=Bounds(0))
    max_grad_norm: float = knob(
        1.0, "gradients are clipped to this norm", "training", bounds=Bounds(0, above=True, below=False)
    )
    seed: int = knob(0, "seed of the split, the order, the adapter's start and dropout", "training")
    val_images: int | None = knob(
        None,
        "held-out images scored at each checkpoint, always the same ones (default: as many as take 2 % of the work of "
        "the steps between two checkpoints). All are scored once, at the end",
        "training",
        bounds=COUNT,
        identity=False,
    )
    watch: int | None = knob(
        None,
        "held-out images captioned at the start and at each checkpoint, always the same, to watch it learn; 0: none. "
        "By default 4, or fewer where that takes more than 3 % of the operations of the steps",
        "training",
        bounds=Bounds(0),
        identity=False,
    )
    patience: int | None = knob(
        None, "stop after N checkpoints without a lower held-out loss; keep the best adapter", "training",
        bounds=COUNT, identity=False,
    )  # fmt: skip
    load_best_at_end: bool = knob(
        False, "keep the adapter with the lowest held-out loss, instead of the last one", "training", identity=False
    )
    on_nonfinite: str = knob(
        "stop", "when a loss or gradient is NaN or infinite: stop, or skip the step; it is never applied", "training",
        choices=("stop", "skip"), identity=False,
    )  # fmt: skip
    max_skipped: int = knob(
        10, "with --on-nonfinite skip: the most steps of a run that may be skipped", "training",
        bounds=Bounds(0), identity=False,
    )  # fmt: skip

    micro_batch_tokens: int | None = knob(
        None, "tokens in one forward and backward pass, padding included (default: 1024 on a CPU; on a GPU as many as "
        "fit into its memory and save time)", "memory", bounds=COUNT,
    )  # fmt: skip
    gradient_checkpointing: bool = knob(
        False, "recompute the language layers in the backward pass: less memory, more time, equal result",
        "memory", identity=False,
    )  # fmt: skip
    compile: str = knob(
        "auto", "use torch.compile for the language layers while training, which takes a minute or two "
        f"first; auto: on a GPU, if the run has {COMPILED_FROM} steps or more", "memory",
        choices=("auto", "yes", "no"), identity=False,
    )  # fmt: skip
    deterministic: bool = knob(
        False, "compute every sum in the same order on a GPU, for bit-exact resume; up to a fifth slower",
        "memory", identity=False,
    )  # fmt: skip
    cache: bool = knob(
        True, "keep the vision tower's output on disk, so that it runs once per image", "memory",
        identity=False,
    )  # fmt: skip
    cache_gb: float = knob(
        DEFAULT_CACHE_GB, "cache size limit in GB; least recently used entries are deleted first",
        "memory", bounds=Bounds(0, above=True, below=False), identity=False,
    )  # fmt: skip

    output: str | None = knob(None, "run folder to write (default: runs/<data>-<date>-<time>)", "run", identity=False)
    save_every: int = knob(200, "optimizer steps between checkpoints", "run", bounds=COUNT, identity=False)
    keep_checkpoints: int = knob(
        2, "newest checkpoints to keep; the best one is kept too", "run",
        bounds=COUNT, identity=False,
    )  # fmt: skip
    report_to: str | None = knob(
        None, "also send the lines of metrics.jsonl to a tracker", "run", choices=("tensorboard", "wandb", "trackio"),
        identity=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for each in KNOBS.values():
            value: Any = _plain(getattr(self, each.name))
            object.__setattr__(self, each.name, value)
            optional = each.default is None and each.name != "data"
            if optional and is_a(value, type(None)):
                continue
            several = each.name == "data" and is_a(value, tuple) and value != ()
            if not (several or is_a(value, each.kind)):
                raise self._wrong(each.name, each.kind.__name__)
            if each.choices and value not in each.choices:
                raise self._wrong(each.name, "one of " + ", ".join(each.choices))
            if each.bounds and value not in each.bounds:
                raise self._wrong(each.name, str(each.bounds))
            if self.method not in each.methods and value != each.default:
                raise ConfigError(
                    f"{each.flag} belongs to --method {' and '.join(each.methods)}; it has no "
                    f"meaning with --method {self.method}."
                )
        self._check_together()

    def _wrong(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{flag_of(name)} is {getattr(self, name)!r}; expected {expected}.")

    def _check_together(self) -> None:
        """Raises ConfigError for knobs that do not go with each other."""
        parse_columns(self.columns)
        if not self.prompt.strip():
            raise self._wrong("prompt", "some words")
        if self.variant == "pissa" and (self.method == "qlora" or self.weight_decay):
            wrong = "--method qlora" if self.method == "qlora" else f"--weight-decay {self.weight_decay}"
            raise ConfigError(f"--variant pissa does not go with {wrong}: half of its tensors must stay as they start.")
        parts = self.lora_targets
        if len(set(parts)) != len(parts) or not set(parts) <= set(PARTS):
            raise self._wrong("targets", f"{', '.join(PARTS)}, or several with commas")
        for name in ("projector_rank", "projector_alpha", "projector_lr"):
            if getattr(self, name) is not None and "projector" not in parts:
                raise ConfigError(f"{flag_of(name)} goes with --targets projector; --targets is {self.targets}.")
        if self.method == "prompt" and self.num_virtual_tokens >= self.max_tokens:
            raise self._wrong("num_virtual_tokens", f"fewer than --max-tokens ({self.max_tokens}), in which they count")
        if self.val is None and self.val_split == 0:
            if self.patience:
                raise self._wrong("patience", "none with --val-split 0: there is no held-out loss")
            if self.load_best_at_end:
                raise self._wrong("load_best_at_end", "no with --val-split 0: nothing is held out")
            if self.val_images:
                raise self._wrong("val_images", "none with --val-split 0: nothing is held out")
            if self.watch:
                raise self._wrong("watch", "0 with --val-split 0: nothing is held out")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}.")

    def on(self, device: str) -> "TrainConfig":
        """The same run with what the type of its device decides: "cuda", "mps" or "cpu".

        On a CPU small micro-batches are faster, because the system has to find memory for large ones each time. For
        "cuda" they are decided later.
        """
        usual = {"cpu": 1024, "cuda": None}.get(device, DEVICE_TOKENS)
        return self.replace(micro_batch_tokens=self.micro_batch_tokens or usual)

    @property
    def tokens_at_once(self) -> int:
        """``micro_batch_tokens``, once they are decided."""
        assert self.micro_batch_tokens is not None
        return self.micro_batch_tokens

    @property
    def sources(self) -> tuple[str, ...]:
        """``data``, as a tuple also for a single one."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha: the one given, else twice the rank. The update is scaled by alpha / rank (arXiv:2106.09685)."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def lora_of_projector(self) -> tuple[int, float]:
        """Rank and alpha of the projector. If only the rank is given, the scale is that of the language layers."""
        rank = self.projector_rank or self.rank
        more = rank / self.rank
        scale = more**0.5 if self.variant == "rslora" else more  # what each divides alpha by
        return rank, self.projector_alpha or self.lora_alpha * scale

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The parts that LoRA adapts."""
        return tuple((self.targets or "language,projector").split(","))

    @property
    def method_settings(self) -> dict[str, Any]:
        """The settings of the method alone, by name, with the values that hold."""
        own = (each.name for each in KNOBS.values() if each.methods != METHODS and self.method in each.methods)
        settings = {name: getattr(self, name) for name in own}
        if "rank" in settings:
            settings |= {"variant": self.variant or "plain", "targets": ",".join(self.lora_targets)}
            settings["alpha"] = self.lora_alpha
            if "projector" in self.lora_targets:
                settings["projector_rank"], settings["projector_alpha"] = self.lora_of_projector
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must stay the same for a checkpoint to be resumed from."""
        return {name: value for name, value in asdict(self).items() if KNOBS[name].identity}

    @property
    def reading(self) -> dict[str, Any]:
        """The settings that decide how rows are read, by name: `DataSettings` takes them."""
        return {each.name: getattr(self, each.name) for each in KNOBS.values() if each.reads}

    @property
    def row_flags(self) -> list[str]:
        """The settings that decide which rows are bad and are not at their default, as flags."""
        named = [(each, getattr(self, each.name)) for each in KNOBS.values() if each.decides_rows]
        return [each.flag if v is True else f"{each.flag}={v}" for each, v in named if v != each.default]

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as ``config.yaml`` has them."""
        return asdict(self)

    def replace(self, **changes: Any) -> "TrainConfig":
        """The same settings with these changes."""
        return replace(self, **changes)


def cache_folder() -> Path:
    """``$VLM_LORA_CACHE``, else ``vlm-lora`` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "vlm-lora"


def _plain(value: Any) -> Any:
    """A value as config.yaml has it: text for a path, a tuple for a list."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def is_a(value: Any, kind: type) -> bool:
    """Whether a value has the type of a knob: an integer is a float too, and True is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)


def _plain_type(hint: Any) -> type:
    """``int`` for ``int | None``, ``str`` for ``str | tuple[str, ...]``."""
    return next((part for part in getattr(hint, "__args__", ()) if part is not type(None)), hint)


KNOBS: dict[str, Knob] = {
    each.name: replace(
        each.metadata["knob"],
        name=each.name,
        kind=_plain_type(get_type_hints(TrainConfig)[each.name]),
        default=None if each.default is MISSING else each.default,
    )
    for each in fields(TrainConfig)
}
"""Every knob by name, in the order of ``--help``."""


def nearest(name: str) -> str | None:
    """The knob that is most probably meant by a name that none has: another tool's word for it, or one like it."""
    words = ELSEWHERE | {each: each for each in KNOBS}
    found = name if name in words else next(iter(get_close_matches(name, words, n=1, cutoff=0.7)), None)
    return words[found] if found else None


def parse_columns(text: str | None) -> dict[str, str]:
    """``image=bild,caption=text`` as a dictionary."""
    columns: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        key, equals, name = part.partition("=")
        if not key.strip() or not equals or not name.strip():
            raise ConfigError(f"--columns is {text!r}; expected image=NAME,caption=NAME")
        columns[key.strip()] = name.strip()
    return columns


def config_from(values: dict[str, Any], source: str) -> TrainConfig:
    """A `TrainConfig` from names and values, such as a YAML file's; ``source`` goes into the errors.

    Raises:
        ConfigError: for an unknown name (with the nearest known one), a value of the wrong type, or missing ``data``.
    """
    checked: dict[str, Any] = {}
    for name, value in values.items():
        name = name if name in KNOBS or f"{name}_" not in KNOBS else f"{name}_"
        if name not in KNOBS:
            near = nearest(str(name))
            hint = f" Did you mean {near.rstrip('_')!r}?" if near else ""
            raise ConfigError(f"{source}: unknown setting {name!r}.{hint}")
        if value is None and KNOBS[name].default is None and name != "data":
            checked[name] = None
            continue
        wanted = KNOBS[name].kind
        if name == "data" and isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            checked[name] = value[0] if len(value) == 1 else tuple(value)
            continue
        if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
        elif wanted is float and isinstance(value, str):  # YAML reads 2e-4, without a point, as text
            with suppress(ValueError):
                value = float(value)
        if not is_a(value, wanted):
            raise ConfigError(f"{source}: {name} is {value!r}; expected {wanted.__name__}.")
        checked[name] = value
    if "data" not in checked:
        raise ConfigError(f"{source}: no data given. Say which folder or file: vlm-lora COMMAND DATA")
    return TrainConfig(**checked)


def read_yaml(path: Path) -> dict[str, Any]:
    """Names and values of a YAML run file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'name: value' lines, found {type(values).__name__}.")
    return values


def inherited(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of a run that starts from another, with what that one decides: the base and what it is shown, the
    prompt, and the adapter's method and sizes.

    Raises:
        ConfigError: there is no such run, or a value is given that differs from its.
    """
    parent = values.get("from_") or values.get("from")
    if not parent:
        return values
    file = Path(parent).expanduser() / "config.yaml"
    if not file.is_file() or not (file.parent / "adapter").is_dir():
        raise ConfigError(f"--from {parent}: expected a run folder, with config.yaml and adapter in it.")
    of_parent = config_from(read_yaml(file), str(file))
    kept = ("model", "min_pixels", "max_pixels", "prompt", *SHAPING)
    taken = {name: getattr(of_parent, name) for name in kept}
    for name in sorted(values.keys() & taken.keys()):
        if values[name] not in (taken[name], of_parent.method_settings.get(name, taken[name])):
            raise ConfigError(
                f"{source}: {flag_of(name)} is {values[name]!r}, and {taken[name]!r} in {parent}, from which "
                "the run starts. Leave it out, or leave out --from."
            )
    return taken | values


def write_yaml(config: TrainConfig, path: Path) -> None:
    import yaml

    head = f"# Started in {os.getcwd()!r}\n"  # where relative paths begin
    path.write_text(head + yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
