"""The base model: found, checked, loaded, and run in pieces. The only module that names Hugging Face internals.

A Qwen2-VL model is a vision tower (``visual.blocks``), a projector that merges each 2x2 patches into one token
(``visual.merger``), and a language model. The tower is frozen here, so what it gives for an image is a constant;
`Backbone.tower` computes it and `Backbone.forward` starts behind it, with the live merger.
"""

import copy
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from inspect import signature
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_lora.errors import ConfigError, ModelError
from vlm_lora.model.attention import use_packed_attention

FAMILIES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}

# Anchored at both ends: "all-linear" would also adapt the tower. merger.mlp.1 is the activation.
LANGUAGE_LINEARS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
MERGER_LINEARS = r"model\.visual\.merger\.mlp\.(?:0|2)"
# The tower's own, of either family; an adapter goes there on request only.
VISION_LINEARS = r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:fc1|fc2|(?:gate|up|down)_proj))"
MAX_ASPECT = 200  # of transformers' smart_resize, which raises beyond it
FITTING = "fit 1"  # goes into the fingerprint of features: change it with what `Preprocessor.preprocess` does
LAYOUTS = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?")
"""What stands before a weight's name in the files of one release of transformers and not in those of another."""

TOWER_PREFIXES = ("model.visual.patch_embed.", "model.visual.blocks.", "model.visual.rotary_pos_emb.")


def tiny_path() -> Path:
    """Folder of the embedded base model: inside an installed wheel, or in the clone this package is run from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "tiny"
    return installed if installed.is_dir() else package.parent / "data" / "tiny" / "model"


def find_model(name: str, *, weights: bool = True) -> Path:
    """The local folder of a base model: ``tiny``, a folder, or a hub name (downloaded if it is not in the hub's cache).

    Without ``weights`` a download leaves them out.

    Raises:
        ModelError: one line saying what was looked for and what else can be done.
    """
    if name == "tiny":
        return tiny_path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"--model {name}: there is no such folder, and a hub name looks like 'owner/name'. "
            "Give a folder that holds config.json and *.safetensors, or --model tiny (embedded, needs no network)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"--model {name}: not on this machine, and the model hub gave no copy ({type(error).__name__}). "
            "Use --model tiny (embedded, needs no network), or download the model elsewhere and give its folder: "
            "--model path/to/folder."
        ) from error


def _json(file: Path) -> dict:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}). Download the base model again.") from error
    if not isinstance(read, dict):
        raise ModelError(f"{file}: holds {str(read)[:20]!r}; expected {{...}}. Download the base model again.")
    return read


def _weight_map(index: Path) -> dict:
    """Which file each weight is in."""
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: weight_map is {str(weight_map)[:20]!r}; expected {{weight: file, ...}}.")
    return weight_map


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    return sorted({folder / part for part in _weight_map(folder / "model.safetensors.index.json").values()})


def _asks_for_code(file: Path) -> bool:
    """Whether there is an ``auto_map`` at any depth: transformers would import the modules that it names."""

    def found(value) -> bool:
        if isinstance(value, dict):
            return "auto_map" in value or any(found(part) for part in value.values())
        return isinstance(value, list) and any(found(part) for part in value)

    return found(_json(file))


def check_model_folder(folder: Path, name: str, *, weights: bool = True) -> dict:
    """Its ``config.json``, once it is sure that loading the folder runs no code and opens no pickle."""
    if not (folder / "config.json").exists():
        raise ModelError(
            f"--model {name}: {folder} holds no config.json. "
            "A base model's folder holds config.json, tokenizer files and *.safetensors."
        )
    config = _json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"--model {name}: {folder} holds an adapter too (adapter_config.json), which would be loaded with the base "
            "unasked. Move adapter_config.json and adapter_model.* to a folder of their own, to be given by --adapter."
        )
    for file in sorted(folder.glob("*config.json")):
        if _asks_for_code(file):
            raise ModelError(f"--model {name}: {file.name} asks for code of its own (auto_map), which is never run.")
    for file in folder.glob("*.safetensors.index.json"):
        odd = [part for part in _weight_map(file).values() if not str(part).endswith(".safetensors")]
        if odd:
            raise ModelError(
                f"--model {name}: {file.name} names {odd[0]}; only *.safetensors are read, never a pickle."
            )
    if config.get("model_type") not in FAMILIES:
        raise ModelError(
            f"--model {name}: its model_type is {config.get('model_type')!r}; supported are {', '.join(FAMILIES)}."
        )
    if weights and not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelError(f"--model {name}: {folder} holds no *.safetensors weights (it holds {', '.join(found)}).")
    return config


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room left. The CPU's says so as a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes it natively and fast, float32 elsewhere.

    Raises:
        ConfigError: bfloat16 is asked for, and the device cannot do it.
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} cannot compute in it. Give --dtype float32, or "
            "leave --dtype out."
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def saved_dtype(name: str) -> torch.dtype:
    """The number format that a base model's files are in, as its config.json says; float32 if it does not."""
    config = check_model_folder(find_model(name), name)
    saved = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return getattr(torch, str(saved), torch.float32)


@dataclass(kw_only=True)
class Preprocessor:
    """A base model's processor without its weights: pictures to patches, sizes to grids, texts to tokens.

    ``name`` is what the user called the model. ``num_prompt_tokens`` tokens, -1, -2 and so on, begin each prefix.
    """

    processor: object
    name: str
    num_prompt_tokens: int = 0

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.processor.image_token)

    @property
    def merge_size(self) -> int:
        return self.processor.image_processor.merge_size

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Smallest and largest image area, in pixels, that the processor resizes to."""
        size = self.processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def preprocess(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """``pixel_values`` (patches, 3 * 2 * patch * patch) of all images, and their ``image_grid_thw`` (n, 3).

        The one place where a picture is given the model's size, in training, evaluation, captioning and the
        demo. It takes any size from 1x1. Pictures so long and thin that the processor would refuse them (one
        side more than 200 times the other) or overshoot ``max_pixels`` stand centred on white, just wide
        enough that it does not.
        """
        fitted = []
        for image in images:
            wide, high, padded = self._fit(*image.size)
            fitted.append(_on_white(image, padded, (wide, high)) if padded else image)
        batch = self.processor.image_processor(images=fitted, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """The ``image_grid_thw`` that `preprocess` gives for a picture of this size; no picture is needed."""
        wide, high, _ = self._fit(width, height)
        patch = self.processor.image_processor.patch_size
        return 1, high // patch, wide // patch

    def _fit(self, width: int, height: int) -> tuple[int, int, tuple[int, int] | None]:
        """Width and height that a picture is resized to, and the size it is first padded to, or None.

        The processor works to whole merged patches, so the area may be above ``max_pixels`` by one row of
        them (of a square picture); where it would be more, the shorter side is padded until it is none.
        """
        smart_resize = _smart_resize()
        factor = self.processor.image_processor.patch_size * self.merge_size
        least, most = self.pixel_limits

        def resized(size: tuple[int, int]) -> tuple[int, int]:
            high, wide = smart_resize(size[1], size[0], factor=factor, min_pixels=least, max_pixels=most)
            return wide, high

        long, short = max(width, height), min(width, height)
        if long <= MAX_ASPECT * short:
            wide, high = resized((width, height))
            if wide * high <= most + factor * (math.isqrt(most) + 1):
                return wide, high, None
        side = max(short, -(-long // MAX_ASPECT))
        while True:
            padded = (long, side) if width >= height else (side, long)
            target = resized(padded)
            # What is pasted must be a size that the processor leaves as it is. So not too long either, and
            # resized twice: with limits close together the first result may be below the lower one.
            if max(target) <= MAX_ASPECT * min(target):
                wide, high = resized(target)
                if least <= wide * high <= most or side >= long:
                    return wide, high, padded
            side = min(long, side + max(1, side // 16))


@dataclass(kw_only=True)
class Backbone(Preprocessor):
    """A loaded base model with its processor.

    ``model`` is transformers' own class, with the weights in ``folder`` (None: random ones). Where it is ``quantised``,
    the language layers' linears are kept in four bits. Where ``tower_adapted``, an adapter sits in the vision blocks:
    what they give is no constant of an image any more.
    ``prefix`` holds ``keys`` and ``values`` ``(layers, heads, count, head_dim)`` that all tokens see, and behind which
    positions begin.
    """

    model: nn.Module
    folder: Path | None = None
    quantised: bool = False
    tower_adapted: bool = False
    prefix: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes. Not `model.device`: that is the tower's, which may be parked."""
        return self.model.model.visual.merger.ln_q.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.visual.merger.ln_q.weight.dtype

    def feature_bytes(self, grid_thw: Sequence[int]) -> int:
        """Size of what `tower` gives for an image of this grid."""
        return math.prod(grid_thw) * self.model.model.visual.merger.ln_q.weight.shape[0] * self.dtype.itemsize

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        return frozenset(i for i in ids if i is not None)

    def twin(self, min_pixels: int, max_pixels: int) -> "Backbone":
        """The same base for another adapter: modules of its own around the very same weights, and pixel limits."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        weights += [weight.quant_state for weight in weights if hasattr(weight, "quant_state")]
        processor = copy.copy(self.processor)
        processor.image_processor = copy.copy(processor.image_processor)
        processor.image_processor.size = dict(self.processor.image_processor.size) | {
            "shortest_edge": min_pixels,
            "longest_edge": max_pixels,
        }
        model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        return replace(self, model=model, processor=processor)

    # -- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tower(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """The frozen tower's output before the merger, ``(patches, width)``; each 4 patches in a row are one token.

        Its value depends on the image and the base alone: `Backbone.forward` runs the merger, which an adapter changes.
        Where one changes the tower too, its value is the pixels, each patch with its image's grid behind it, and
        `Backbone.forward` runs the tower as well.
        """
        if self.tower_adapted:
            grids = image_grid_thw.repeat_interleave(image_grid_thw.prod(-1), 0)
            return torch.cat([pixel_values, grids.to(pixel_values.dtype)], 1)
        self.park_tower(self.device)  # that is, have it back
        return self._through_blocks(pixel_values, image_grid_thw)

    def _through_blocks(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        pixel_values, grid = pixel_values.to(self.device, self.dtype), image_grid_thw.to(self.device)
        visual = self.model.model.visual
        # The stock forward would run the merger too, to no use, and its dropout would draw random numbers.
        merger, visual.merger = visual.merger, nn.Identity()
        try:
            features = visual(pixel_values, grid_thw=grid).last_hidden_state
        finally:
            visual.merger = merger
        if self.model.config.model_type == "qwen2_5_vl":
            features = self._leave_windows(features, grid)
        return features

    def park_tower(self, device: torch.device | str = "cpu") -> None:
        """Have the tower's weights elsewhere while they are not needed; `tower` takes them back by itself."""
        self.model.model.visual.patch_embed.to(device)
        self.model.model.visual.blocks.to(device)

    def _live_features(self, patches: torch.Tensor) -> torch.Tensor:
        """Through the adapted tower, from pixels with their grids behind them."""
        grids, at = [], 0
        while at < len(patches):
            grids.append(patches[at, -3:].long())
            at += int(grids[-1].prod())
        return self._through_blocks(patches[:, :-3], torch.stack(grids))

    def _leave_windows(self, features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Qwen2.5-VL's tower works in windows and orders its tokens back after the merger; here it is done before."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        visual = self.model.model.visual
        window_index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        groups = features.view(-1, self.merge_size**2, features.shape[-1])
        return groups[torch.argsort(window_index)].reshape(features.shape)

    @cached_property
    def tower_fingerprint(self) -> str:
        """Hash of everything that decides what `tower` gives for a picture: weights, number format, preprocessing."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(TOWER_PREFIXES):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(str(self.dtype).encode())
        digest.update(json.dumps(self.model.config.vision_config.to_dict(), sort_keys=True, default=str).encode())
        digest.update(self.processor.image_processor.to_json_string().encode())
        digest.update(type(self.processor.image_processor).__name__.encode())
        digest.update(FITTING.encode())
        return digest.hexdigest()

    @cached_property
    def base_fingerprint(self) -> str:
        """Tells one base from another: a hash of its weights' names and shapes, then one of a row of each weight.

        Of the files, so that neither how they were loaded (number format, four bits, in pieces) nor the release of
        transformers is in it; a copy in a wider number format is the same base. Random weights have none: "".
        """
        if self.folder is None:
            return ""
        shapes, values = hashlib.sha256(), hashlib.sha256()
        with ExitStack() as opened:
            paths = _weight_files(self.folder) if self.folder else []  # random weights are nobody's
            files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
            found = {LAYOUTS.sub("", name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118
            for plain, (file, name) in sorted(found.items()):
                if plain == "lm_head.weight" or not plain.endswith((".weight", ".bias")):
                    continue  # the head, where it is the embeddings again, is in some copies and not in others
                weight = file.get_slice(name)
                shape = weight.get_shape()
                shapes.update(f"{plain} {shape}".encode())
                middle = shape[0] // 2
                part = weight[middle : middle + 1] if len(shape) > 1 else weight[:]
                values.update(part.float().contiguous().numpy().data)
        return shapes.hexdigest()[:32] + values.hexdigest()[:32]

    # -- language ------------------------------------------------------------------------------------------------

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def checkpoint_layers(self) -> None:
        """From here on the language layers keep no activations while training, and run again in the backward pass
        (arXiv:1604.06174)."""
        for layer in self.language_model.layers:
            # Around the stock forward: transformers' own switch would drop the prefix, which comes as a cache.
            layer.forward = partial(_run_again, layer, layer.forward)

    def new_cache(self):
        """An empty cache of keys and values for `forward`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.text_config)

    @cached_property
    def _cache_argument(self) -> str:
        """The name of the cache in transformers' forward: ``cache`` since 5.24, which warns of the older one."""
        return next(n for n in ("cache", "past_key_values") if n in signature(self.model.model.forward).parameters)

    def _behind_prefix(self, attention_mask, position_ids, cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and positions with the prefix before them; an empty cache gets its keys and values."""
        count = self.prefix.keys.shape[2]
        if cache.get_seq_length() == 0:
            for layer, pairs in enumerate(zip(self.prefix.keys, self.prefix.values, strict=True)):
                cache.update(*(p.to(self.dtype).expand(len(attention_mask), -1, -1, -1) for p in pairs), layer)
        seen = attention_mask.new_ones(*attention_mask.shape[:-1], count)
        return torch.cat([seen, attention_mask], dim=-1), position_ids + count

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        features: torch.Tensor | None,
        past_key_values=None,
    ) -> torch.Tensor:
        """Last hidden states ``(B, T, hidden)``, through the live merger and the public forward.

        Args:
            input_ids: ``(B, T)``, image placeholders included.
            attention_mask: boolean ``(B, 1, W, T)``, that of the last ``W`` tokens, those before being causal; or
                ``(B, T)`` of ones and zeros.
            position_ids: ``(3, B, T)``; always given, as the model would work out others for packed rows.
            features: what `tower` gave for all images of the batch in reading order, ``(patches, width)``; None if the
                input holds no image.

        Raises:
            ModelError: image placeholders and features do not match: going on would scatter them wrongly, in silence.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoded = None
        if features is not None:
            features = self._live_features(features) if self.tower_adapted else features
            merged = self.model.model.visual.merger(features)
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=(merged,))}
        if self.prefix is not None:
            cache = self.new_cache() if past_key_values is None else past_key_values
            attention_mask, position_ids = self._behind_prefix(attention_mask, position_ids, cache)
            past_key_values = _read_only(cache) if past_key_values is None else past_key_values
        if attention_mask.ndim == 4:
            # What SDPA makes of a boolean mask, anew in each layer, and keeps for each layer's backward pass.
            empty = torch.zeros_like(attention_mask, dtype=self.dtype)
            attention_mask = empty.masked_fill_(~attention_mask, float("-inf"))
        return self.model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=encoded,
            use_cache=past_key_values is not None,
            **{self._cache_argument: past_key_values},
        ).last_hidden_state

    def shard(self, group, device: torch.device) -> None:
        """Keep the language layers' frozen weights in pieces over the processes of ``group``, the rest on ``device``.

        FSDP2 puts a layer together while it computes and takes it apart again. What trains stays whole in each process:
        it is small, and so optimizer, gradient norm and saving know nothing of this. So do tower, embeddings and head.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, device.type)
        language = self.language_model
        pieces = {p for layer in language.layers for p in layer.parameters() if not p.requires_grad}
        kept = set(language.parameters()) - pieces
        for layer in language.layers:
            fully_shard(layer, mesh=mesh, ignored_params=kept)
        fully_shard(language, mesh=mesh, ignored_params=kept)
        self.model.to(device)
        # All must put the layers together in the backward pass too: also one whose rows have nothing that is trained.
        self.model.enable_input_require_grads()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(..., hidden)`` to ``(..., vocabulary)``."""
        return self.model.lm_head(hidden)


def _run_again(layer: nn.Module, forward, *args, **kwargs):
    if layer.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def _read_only(cache):
    """The cache, which from here on keeps nothing new: a layer that runs twice would find its own keys in it."""

    def update(keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        kept = cache.layers[layer]
        return torch.cat([kept.keys, keys], -2), torch.cat([kept.values, values], -2)

    cache.update = update
    return cache


def load_backbone(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    quantise: bool = False,
) -> Backbone:
    """Load a base model and its processor, everything frozen.

    ``min_pixels`` and ``max_pixels`` replace the processor's limits on an image's area. ``quantise`` keeps the language
    layers' linears in four bits (NF4, double quantisation, arXiv:2305.14314); they compute in ``dtype``.
    """
    if quantise:
        require_bitsandbytes()
    folder = find_model(name)
    config = check_model_folder(folder, name)
    device = device or best_device()

    import transformers

    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, FAMILIES[config["model_type"]])
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=resolve_dtype(dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            **(_four_bits(resolve_dtype(dtype, device), device) if quantise else {}),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_be_loaded(name, folder, error) from error
    preprocessor = _preprocessor(folder, config, name, min_pixels, max_pixels)
    missing = sorted(set(report["missing_keys"]) | set(report["mismatched_keys"]))
    if missing:
        raise ModelError(f"--model {name}: {len(missing)} weights are missing or misshapen, first {missing[0]}.")
    # Packing needs a mask per token pair; eager attention would misread it, flash attention takes none.
    use_packed_attention(model)
    model.requires_grad_(False)
    model = model.to(device).eval()
    if quantise:
        _keep_as_quantised(model)
    return Backbone(model=model, processor=preprocessor.processor, name=name, folder=folder, quantised=quantise)


def load_preprocessor(name: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Preprocessor:
    """A base model's processor alone, in a second where the model takes minutes: enough to count tokens."""
    folder = find_model(name, weights=False)
    return _preprocessor(folder, check_model_folder(folder, name, weights=False), name, min_pixels, max_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of a base model, from its config alone. ``linears`` of a part are (inputs, outputs) of each of its linears,
    those of all its layers."""

    parameters: int
    language_linears: tuple[tuple[int, int], ...]
    tower_linears: tuple[tuple[int, int], ...]
    merger_linears: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tower_width: int
    tower_windows: tuple[int | None, ...]
    """Patches that see each other, for each layer of the tower; None: all of an image's."""


def load_shapes(name: str) -> Shapes:
    """A base model's sizes; no weights are read."""
    return shapes_of(_without_weights(name))


def shapes_of(model: nn.Module) -> Shapes:
    """The sizes of a model that no adapter sits in yet."""
    text, vision, visual = model.config.text_config, model.config.vision_config, model.model.visual
    head_dim = model.model.language_model.layers[0].self_attn.head_dim
    if model.config.model_type == "qwen2_5_vl":
        whole, window = vision.fullatt_block_indexes, (vision.window_size // vision.patch_size) ** 2
        windows = tuple(None if i in whole else window for i in range(len(visual.blocks)))
    else:
        windows = (None,) * len(visual.blocks)
    patch = visual.patch_embed.proj.weight
    return Shapes(
        parameters=sum(map(num_numbers, model.parameters())),
        language_linears=_linears(model.model.language_model.layers),
        tower_linears=(*_linears(visual.blocks), (patch[0].numel(), len(patch))),
        merger_linears=_linears(visual.merger),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        tower_width=len(patch),
        tower_windows=windows,
    )


def num_numbers(parameter: nn.Parameter) -> int:
    """How many it holds, also where two of them are kept in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()


def _linears(part: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((m.in_features, m.out_features) for m in part.modules() if isinstance(m, nn.Linear))


def _without_weights(name: str, device: torch.device | str = "meta", dtype=torch.float32, layers=None) -> nn.Module:
    """The model with random weights, which on the meta device are shapes alone; with fewer ``layers``, few tokens."""
    import transformers

    folder = find_model(name, weights=False)
    model_class = getattr(transformers, FAMILIES[check_model_folder(folder, name, weights=False)["model_type"]])
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_be_loaded(name, folder, error) from error
    if layers:
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
        text.vocab_size, text.pad_token_id, vision.depth = 1024, None, layers
    with torch.device(device):
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    use_packed_attention(model)
    return model


def load_sample(name: str, *, dtype: str, device: torch.device) -> Backbone:
    """One random layer of language and of tower each, as wide as the base's, to measure how fast they are here."""
    model = _without_weights(name, device, resolve_dtype(dtype, device), layers=1)
    processor = load_preprocessor(name).processor
    return Backbone(model=model.requires_grad_(False), processor=processor, name=name)


def _preprocessor(
    folder: Path, config: dict, name: str, min_pixels: int | None, max_pixels: int | None
) -> Preprocessor:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_be_loaded(name, folder, error) from error
    images = processor.image_processor
    least, most = min_pixels or images.size["shortest_edge"], max_pixels or images.size["longest_edge"]
    cell = images.patch_size * images.merge_size
    if least > most or most < cell**2:
        raise ModelError(
            f"--model {name}: images cannot be at least {least} and at most {most} pixels; one token is "
            f"{cell**2}. Give both --min-pixels and --max-pixels."
        )
    # Sizes are whole tokens. Where no square of them lies between the limits, the upper one holds.
    # One less than the square: the processor rounds up, and would make 224.00000001 pixels a token more.
    least = min(least, (math.isqrt(most) // cell * cell) ** 2 - 1)
    images.size = dict(images.size) | {"shortest_edge": least, "longest_edge": most}
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_token != config.get("image_token_id"):
        raise ModelError(
            f"--model {name}: the tokenizer's {processor.image_token} is token {image_token}, but config.json says "
            f"image_token_id {config.get('image_token_id')}. Model and tokenizer are not of one checkpoint."
        )
    return Preprocessor(processor=processor, name=name)


def require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("QLoRA needs bitsandbytes, which is not installed: pip install 'vlm-lora[qlora]'.")


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],  # by default tower and merger would be quantised too
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_as_quantised(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks the weights once they are used in eval mode, for a kernel that
    rounds to bfloat16 and knows no gradients, and leaves them so for training and merging. Not so here."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _cannot_be_loaded(name: str, folder: Path, error: Exception) -> ModelError:
    return ModelError(f"--model {name}: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}")


@cache
def _smart_resize():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize


def _on_white(image: Image.Image, padded: tuple[int, int], target: tuple[int, int]) -> Image.Image:
    """The image as if padded with white and then resized; the padded one, perhaps terabytes, is not made."""
    size = [max(1, round(side * t / p)) for side, p, t in zip(image.size, padded, target, strict=True)]
    canvas = Image.new("RGB", target, "white")
    corner = ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return canvas
