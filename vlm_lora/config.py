"""Every knob of a training run, once: its name, default, unit and help. Flags, YAML and Python read them from here."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from vlm_lora.errors import ConfigError

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEFAULT_PROMPT = "Describe this image."
DEFAULT_MAX_NEW_TOKENS = 64
DEFAULT_CACHE_GB = 50.0
COLUMNS_HELP = "columns of unusual names, as image=NAME,caption=NAME (also question, answer, kind)"
ALLOW_OUTSIDE_HELP = "trust the data: take images outside of its folder too, through .. or symlinks"
IMAGES_HELP = "folder where images are looked for that are not beside the data"
ALLOW_URLS_HELP = "download images that the data names by http:// or https://, from public addresses only"


def knob(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. All fields but ``data`` have a default; `ConfigError` names the field that is wrong."""

    data: str | tuple[str, ...] = field(
        metadata={"help": "folder or file with images and captions, or questions and answers; or several, "
        "DATA:2 for one whose answers are to be seen twice an epoch"}
    )  # fmt: skip
    model: str = knob(DEFAULT_MODEL, "base model: hub name, local folder, or 'tiny' (embedded, needs no network)")
    output: str | None = knob(None, "run folder to write; by default runs/<data>-<date>-<time>")
    format: str | None = knob(None, "format of the data; by default it is found out by looking")
    columns: str | None = knob(None, COLUMNS_HELP)
    images: str | None = knob(None, IMAGES_HELP)
    allow_outside: bool = knob(False, ALLOW_OUTSIDE_HELP)
    allow_urls: bool = knob(False, ALLOW_URLS_HELP)
    prompt: str = knob(DEFAULT_PROMPT, "the instruction that a caption answers")
    val: str | None = knob(None, "held-out data of its own, instead of a part split off")
    val_split: float = knob(0.1, "fraction of the images held out when --val is not given; 0 holds out none")
    on_bad_row: str = knob("stop", "what to do about rows that cannot be used", choices=("stop", "quarantine"))

    method: str = knob("lora", "fine-tuning method", choices=("lora", "qlora", "adapter", "prompt", "prefix"))
    variant: str | None = knob(None, "LoRA variant; by default plain", choices=("plain", "rslora", "dora", "pissa"))
    targets: str | None = knob(
        None,
        "what LoRA adapts, with commas: language, projector, vision; by default language,projector. With vision each "
        "step runs the vision tower, and nothing can be cached",
    )
    rank: int = knob(16, "LoRA rank r")
    alpha: float | None = knob(None, "LoRA alpha; by default twice the rank")
    projector_rank: int | None = knob(None, "LoRA rank r of the projector; by default --rank")
    projector_alpha: float | None = knob(None, "LoRA alpha of the projector; by default as --alpha, for its own rank")
    dropout: float = knob(0.0, "LoRA dropout, a probability")
    bottleneck: int = knob(16, "width of the adapters of --method adapter")
    num_virtual_tokens: int = knob(16, "trained vectors (--method prompt) or pairs a layer (--method prefix)")

    epochs: float = knob(3.0, "passes over the training answers")
    max_steps: int | None = knob(None, "stop after so many optimizer steps, whatever --epochs says")
    batch_size: int = knob(
        16, "answers per optimizer step, give or take: those of one image share its tokens, and stay in one step"
    )
    lr: float = knob(2e-4, "peak learning rate")
    projector_lr: float | None = knob(None, "peak learning rate of the projector's LoRA; by default --lr")
    warmup: float = knob(0.05, "fraction of the steps over which the learning rate rises")
    weight_decay: float = knob(0.0, "AdamW weight decay")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm")
    micro_batch_tokens: int | None = knob(
        None, "tokens, padding included, in one forward and backward pass; by default 4096 on a GPU, 1024 on a CPU"
    )
    gradient_checkpointing: bool = knob(
        False, "keep no activations of the language layers and compute them again: less memory, more time, equal result"
    )
    max_tokens: int = knob(4096, "longest image-and-answer sequence allowed; longer ones are reported as bad rows")
    seed: int = knob(0, "seed of the split, the order, the adapter's start and dropout")

    dtype: str = knob(
        "auto", "number format of the base: bfloat16 where the device is good at it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    min_pixels: int | None = knob(None, "smallest image area in pixels; by default what the model's processor says")
    max_pixels: int | None = knob(None, "largest image area in pixels; by default what the model's processor says")
    cache: bool = knob(True, "keep the frozen vision tower's output on disk, so that it runs once per image ever")
    cache_gb: float = knob(DEFAULT_CACHE_GB, "most that it may take there, GB; what was used longest ago goes first")
    save_every: int = knob(200, "optimizer steps between checkpoints")
    keep_checkpoints: int = knob(2, "how many of the newest checkpoints are kept; the best one is kept beside them")
    patience: int | None = knob(
        None,
        "stop once the held-out loss has not fallen at so many checkpoints in a row, and end with the best adapter",
    )
    load_best_at_end: bool = knob(False, "end with the adapter of the lowest held-out loss, instead of the last one")
    on_nonfinite: str = knob(
        "stop", "what to do when a loss or gradient is NaN or infinite; it is never applied", choices=("stop", "skip")
    )
    max_skipped: int = knob(10, "with --on-nonfinite skip, how many steps of a run may be left out")
    report_to: str | None = knob(
        None, "also send metrics.jsonl's lines to a tracker", choices=("tensorboard", "wandb", "trackio")
    )

    def __post_init__(self) -> None:
        def require(good: bool, name: str, expected: str) -> None:
            if not good:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {getattr(self, name)!r}; expected {expected}.")

        for knob_field in fields(self):
            choices = knob_field.metadata.get("choices")
            if choices and not (knob_field.default is None and getattr(self, knob_field.name) is None):
                require(getattr(self, knob_field.name) in choices, knob_field.name, "one of " + ", ".join(choices))
        require(0 <= self.val_split < 1, "val_split", "a fraction from 0 to below 1")
        for name in METHOD_KNOBS:
            if self.method not in METHOD_KNOBS[name] and getattr(self, name) != default_of(name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} belongs to --method {' and '.join(METHOD_KNOBS[name])}; "
                    f"--method {self.method} has no such thing."
                )
        if self.variant == "pissa" and (self.method == "qlora" or self.weight_decay):
            wrong = "--method qlora" if self.method == "qlora" else f"--weight-decay {self.weight_decay}"
            raise ConfigError(f"--variant pissa does not go with {wrong}: half of its tensors must stay as they start.")
        parts = self.lora_targets
        good = len(set(parts)) == len(parts) and set(parts) <= {"language", "projector", "vision"}
        require(good, "targets", "language, projector, vision, or several with commas")
        require(self.rank >= 1, "rank", "1 or more")
        require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "a finite number above 0")
        require(0 <= self.dropout < 1, "dropout", "a probability from 0 to below 1")
        for name in ("projector_rank", "projector_alpha", "projector_lr"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "a finite number above 0")
            if value is not None and "projector" not in parts:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} goes with --targets projector; --targets is {self.targets}.")
        require(self.bottleneck >= 1, "bottleneck", "1 or more")
        require(self.num_virtual_tokens >= 1, "num_virtual_tokens", "1 or more")
        require(0 < self.epochs < math.inf, "epochs", "a finite number above 0")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", "1 or more")
        require(self.batch_size >= 1, "batch_size", "1 or more answers")
        require(0 < self.lr < math.inf, "lr", "a finite number above 0")
        require(0 <= self.warmup <= 1, "warmup", "a fraction from 0 to 1")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number, 0 or more")
        require(self.max_grad_norm > 0, "max_grad_norm", "a number above 0")
        require(self.max_tokens >= 16, "max_tokens", "16 or more")
        fits = self.method != "prompt" or self.num_virtual_tokens < self.max_tokens
        require(fits, "num_virtual_tokens", f"fewer than --max-tokens ({self.max_tokens}), in which they count")
        require(self.micro_batch_tokens is None or self.micro_batch_tokens >= 1, "micro_batch_tokens", "1 or more")
        require(self.cache_gb > 0, "cache_gb", "a size above 0")
        require(self.save_every >= 1, "save_every", "1 or more steps")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", "1 or more")
        require(self.patience is None or self.patience >= 1, "patience", "1 or more")
        require(self.max_skipped >= 0, "max_skipped", "0 or more steps")
        held_out = self.val is not None or self.val_split > 0
        require(held_out or not self.patience, "patience", "none with --val-split 0: there is no held-out loss")
        require(held_out or not self.load_best_at_end, "load_best_at_end", "no with --val-split 0: nothing is held out")
        require(self.prompt.strip() != "", "prompt", "some words")
        parse_columns(self.columns)
        for name in ("min_pixels", "max_pixels"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, "a number of pixels above 0")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}.")

    def on(self, device: str) -> "TrainConfig":
        """The same run with what is decided by the type of its device, "cuda" or "cpu".

        On a CPU small micro-batches are faster: memory for larger ones comes from the system anew each time.
        """
        return self.replace(micro_batch_tokens=self.micro_batch_tokens or (1024 if device == "cpu" else 4096))

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)

    @property
    def lora_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def lora_of_projector(self) -> tuple[int, float]:
        """Rank and alpha; where only the rank is given, the learning goes on at the scale of the language layers'."""
        rank = self.projector_rank or self.rank
        more = rank / self.rank
        scale = more**0.5 if self.variant == "rslora" else more  # what each divides alpha by
        return rank, self.projector_alpha or self.lora_alpha * scale

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return tuple((self.targets or "language,projector").split(","))

    @property
    def method_settings(self) -> dict[str, Any]:
        """The knobs of the method, by name, with the values that hold where none was given."""
        settings = {name: getattr(self, name) for name, methods in METHOD_KNOBS.items() if self.method in methods}
        if "rank" in settings:
            settings |= {"variant": self.variant or "plain", "targets": ",".join(self.lora_targets)}
            settings["alpha"] = self.lora_alpha
            if "projector" in self.lora_targets:
                settings["projector_rank"], settings["projector_alpha"] = self.lora_of_projector
        return {name: value for name, value in settings.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> "TrainConfig":
        return replace(self, **changes)


LORA_KNOBS = ("variant", "targets", "rank", "alpha", "dropout", "projector_rank", "projector_alpha", "projector_lr")
METHOD_KNOBS = dict.fromkeys(LORA_KNOBS, ("lora", "qlora")) | {
    "bottleneck": ("adapter",),
    "num_virtual_tokens": ("prompt", "prefix"),
}
"""The methods that a knob belongs to; given with another one it is refused, as it would do nothing there. Not at its
default value: a run's config.yaml, which may be given again, names every knob."""


def parse_columns(text: str | None) -> dict[str, str]:
    """``image=bild,caption=text`` as a dictionary."""
    columns: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        key, equals, name = part.partition("=")
        if not key.strip() or not equals or not name.strip():
            raise ConfigError(f"--columns is {text!r}; expected image=NAME,caption=NAME")
        columns[key.strip()] = name.strip()
    return columns


def knob_type(name: str) -> type:
    """The plain type of a field of `TrainConfig`: ``int`` for ``int | None``."""
    hint = get_type_hints(TrainConfig)[name]
    return next((part for part in getattr(hint, "__args__", ()) if part is not type(None)), hint)


def default_of(name: str) -> Any:
    return next(f.default for f in fields(TrainConfig) if f.name == name)


def config_from(values: dict[str, Any], source: str) -> TrainConfig:
    """A `TrainConfig` from names and values, such as a YAML file's; ``source`` goes into the errors.

    Raises:
        ConfigError: for an unknown name (with the nearest known one), a value of the wrong type, or missing ``data``.
    """
    known = {f.name: f for f in fields(TrainConfig)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: unknown setting {name!r}.{hint}")
        if value is None and known[name].default is None:
            checked[name] = None
            continue
        wanted = knob_type(name)
        if name == "data" and isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            checked[name] = value[0] if len(value) == 1 else tuple(value)
            continue
        if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
        elif wanted is float and isinstance(value, str):  # YAML reads 2e-4, without a point, as text
            with suppress(ValueError):
                value = float(value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise ConfigError(f"{source}: {name} is {value!r}; expected {wanted.__name__}.")
        checked[name] = value
    if "data" not in checked:
        raise ConfigError(f"{source}: no data given. Say which folder or file to train on: vlm-lora train DATA")
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


def write_yaml(config: TrainConfig, path: Path) -> None:
    import yaml

    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
