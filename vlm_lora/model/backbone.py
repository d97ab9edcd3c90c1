"""The base model loaded, and run in pieces.

A Qwen-VL model is a vision tower (``visual.blocks``), a projector that merges each 2x2 patches into one token
(``visual.merger``), and a language model. The tower is frozen here, so what it gives for an image is a constant;
`Backbone.tower` computes it and `Backbone.forward` starts behind it, with the live merger.

Qwen3-VL shows its language layers some of the tower's inner layers too (DeepStack, arXiv:2406.04334): each goes through
a merger of its own (``visual.deepstack_merger_list``), and is added to what one of the first language layers gives.
"""

import copy
import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_lora.errors import ModelError
from vlm_lora.model.attention import use_packed_attention
from vlm_lora.model.device import best_device, resolve_dtype
from vlm_lora.model.folder import FAMILIES, cannot_be_loaded, check_model_folder, find_model, fingerprint
from vlm_lora.model.linears import PackedLinear
from vlm_lora.model.preprocess import FITTING, Preprocessor, read_preprocessor

# Anchored at both ends: "all-linear" would also adapt the tower. merger.mlp.1 is the activation; Qwen3-VL's two linears
# have names instead.
LANGUAGE_LINEARS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
MERGER_LINEARS = r"model\.visual\.(?:merger\.mlp\.(?:0|2)|(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12])"
# The tower's own, of any family; an adapter goes there on request only.
VISION_LINEARS = r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:(?:linear_)?fc[12]|(?:gate|up|down)_proj))"
TOWER_PARTS = ("patch_embed", "pos_embed", "rotary_pos_emb", "blocks")
TOWER_PREFIXES = tuple(f"model.visual.{part}." for part in TOWER_PARTS)


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
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    def feature_bytes(self, grid_thw: Sequence[int]) -> int:
        """Size of what `tower` gives for an image of this grid."""
        return math.prod(grid_thw) * self._tower_width * len(mergers_of(self.model)) * self.dtype.itemsize

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
        weights += [module.packed for module in self.model.modules() if isinstance(module, PackedLinear)]
        processor = copy.copy(self.processor)
        processor.image_processor = copy.copy(processor.image_processor)
        processor.image_processor.size = dict(self.processor.image_processor.size) | {
            "shortest_edge": min_pixels,
            "longest_edge": max_pixels,
        }
        model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        return replace(self, model=model, processor=processor)

    # -- pictures ------------------------------------------------------------------------------------------------

    @property
    def _tower_width(self) -> int:
        return len(self.model.model.visual.patch_embed.proj.weight)

    @torch.no_grad()
    def tower(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """The frozen tower's output before the merger, ``(patches, width)``; each 4 patches in a row are one token.
        Qwen3-VL's has its inner layers beside the last one.

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
        family = self.model.config.model_type
        given = _without_mergers(self.model.model.visual)(pixel_values, grid_thw=grid)
        if family == "qwen2_5_vl":
            return self._leave_windows(given.last_hidden_state, grid)
        if family == "qwen3_vl":
            return torch.cat([given.last_hidden_state, *given.deepstack_features], 1)
        return given.last_hidden_state

    def park_tower(self, device: torch.device | str = "cpu") -> None:
        """Have the tower's weights elsewhere while they are not needed; `tower` takes them back by itself."""
        visual = self.model.model.visual
        for part in TOWER_PARTS:
            if hasattr(visual, part):  # an embedding of positions is Qwen3-VL's alone
                getattr(visual, part).to(device)

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
        """The `fingerprint` of the folder; random weights have none: ""."""
        return fingerprint(self.folder) if self.folder else ""

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
    def cache_argument(self) -> str:
        """The name of the cache in transformers' forward: ``cache`` since 5.24, which warns of the older one."""
        return next(n for n in ("cache", "past_key_values") if n in signature(self.language_model.forward).parameters)

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
        """Last hidden states ``(B, T, hidden)``, through the live merger and the language model's public forward.

        Args:
            input_ids: ``(B, T)``, image placeholders included. Where they are on the CPU, no GPU is waited for.
            attention_mask: boolean ``(B, 1, W, T)``, that of the last ``W`` tokens, those before being causal; or
                ``(B, T)`` of ones and zeros.
            position_ids: ``(3, B, T)``; always given, as the model would work out others for packed rows.
            features: what `tower` gave for all images of the batch in reading order, ``(patches, width)``; None if the
                input holds no image.

        Raises:
            IndexError: not as many image placeholders as features.
        """
        vectors = self.language_model.embed_tokens(input_ids.to(self.device, non_blocking=True))
        shown = {}
        if features is not None:
            features = self._live_features(features) if self.tower_adapted else features
            parts = zip(mergers_of(self.model), features.split(self._tower_width, 1), strict=True)
            merged, *deeper = (merger(part.contiguous()).to(vectors.dtype) for merger, part in parts)
            # The stock forward would ask the device how many they are, and its backward pass again.
            places = (input_ids == self.image_token_id).flatten().nonzero()[:, 0].to(self.device, non_blocking=True)
            vectors = vectors.flatten(0, 1).index_copy(0, places, merged).view_as(vectors)
            if deeper:
                # Whole rows, with zeros for all that is no image: from a mask of places, the stock forward would have
                # the device count them in each layer.
                empty = torch.zeros_like(vectors).flatten(0, 1)
                shown = {
                    "visual_pos_masks": torch.arange(len(vectors), device=vectors.device),
                    "deepstack_visual_embeds": [empty.index_copy(0, places, d).view_as(vectors) for d in deeper],
                }
        if self.prefix is not None:
            cache = self.new_cache() if past_key_values is None else past_key_values
            attention_mask, position_ids = self._behind_prefix(attention_mask, position_ids, cache)
            past_key_values = _read_only(cache) if past_key_values is None else past_key_values
        if attention_mask.ndim == 4:
            # What SDPA makes of a boolean mask, anew in each layer, and keeps for each layer's backward pass.
            added = torch.zeros_like(attention_mask, dtype=self.dtype)
            attention_mask = added.masked_fill_(~attention_mask, float("-inf"))
        return self.language_model(
            inputs_embeds=vectors,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{self.cache_argument: past_key_values},
            **shown,
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


def mergers_of(model: nn.Module) -> list[nn.Module]:
    """The projector's: of the tower's last layer, then of those inside it that are shown too."""
    visual = model.model.visual
    return [visual.merger, *(visual.deepstack_merger_list if model.config.model_type == "qwen3_vl" else ())]


def _without_mergers(visual: nn.Module) -> nn.Module:
    """The same tower, whose stock forward ends before the mergers. It would run them to no use, and the dropout of an
    adapter in them would draw random numbers.

    A shallow copy, as others may be at work with the whole one.
    """
    bare = copy.copy(visual)
    bare._modules = dict(visual._modules)
    bare.merger = nn.Identity()
    if "deepstack_merger_list" in bare._modules:
        bare.deepstack_merger_list = nn.ModuleList(nn.Identity() for _ in visual.deepstack_merger_list)
    return bare


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
        raise cannot_be_loaded(name, folder, error) from error
    preprocessor = read_preprocessor(folder, config, name, min_pixels, max_pixels)
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
