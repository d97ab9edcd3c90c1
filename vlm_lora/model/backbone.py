"""The base model loaded, and run in pieces.

A Qwen-VL model is a vision tower (``visual.blocks``), a projector that merges each 2x2 patches into one token
(``visual.merger``), and a language model. The tower is frozen here, so what it gives for an image is a constant;
`Backbone.tower` computes it and `Backbone.forward` starts after it, with the live merger. What is particular to a
family of models is in `families`.
"""

import copy
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_lora.errors import ModelError
from vlm_lora.model import kernels
from vlm_lora.model.attention import use_packed_attention
from vlm_lora.model.device import best_device, resolve_dtype
from vlm_lora.model.families import ADAPTED, QwenVL
from vlm_lora.model.folder import cannot_be_loaded, check_model_folder, find_model, fingerprint
from vlm_lora.model.preprocess import FITTING, Pixels, Preprocessor, read_preprocessor
from vlm_lora.model.recurrent import Forks


@dataclass(kw_only=True)
class Backbone(Preprocessor):
    """A loaded base model with its processor.

    ``model`` is transformers' own class, with the weights in ``folder`` (None: random ones). Where it is ``quantised``,
    the language layers' linears are kept in four bits. An adapter puts modules of its own into the model; what they
    change here (`num_prompt_tokens`, `prefix`, `tower_adapted`) is asked of the model each time.
    """

    model: QwenVL
    folder: Path | None = None
    quantised: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes. Not `model.device`: that is the tower's, which may be parked."""
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of pixels."""
        return self.model.model.visual.patch_embed.proj.weight[0].numel()

    @property
    def feature_width(self) -> int:
        """Numbers that `tower` gives for a patch."""
        return self._tower_width * len(self.family.mergers_of(self.model))

    def feature_bytes(self, grid_thw: Sequence[int]) -> int:
        """Size of what `tower` gives for an image of this grid."""
        return math.prod(grid_thw) * self.feature_width * self.dtype.itemsize

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

    # -- what an adapter has put into the model ------------------------------------------------------------------

    @property
    def num_prompt_tokens(self) -> int:
        return getattr(self.language_model.embed_tokens, "num_prompt_tokens", 0)

    @property
    def prefix(self) -> Any:
        """Holds ``keys`` and ``values`` ``(layers, heads, count, head_dim)`` that all tokens see, and after which
        positions begin; None: there is no prefix, or it is switched off."""
        prefix = getattr(self.language_model, "prefix", None)
        return prefix if prefix is not None and prefix.on else None

    @property
    def tower_adapted(self) -> bool:
        """Whether an adapter sits in the tower: what that gives for an image is not a constant any more."""
        names = (name for name, _ in self.model.named_parameters())
        return any(name.startswith(self.family.tower_prefixes) and ADAPTED.search(name) for name in names)

    # -- pictures ------------------------------------------------------------------------------------------------

    @property
    def _tower_width(self) -> int:
        return len(self.model.model.visual.patch_embed.proj.weight)

    @torch.no_grad()
    def tower(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """The frozen tower's output before the merger, ``(patches, width)``, of `Pixels`; each 4 patches in a row are
        one token. Where inner layers are shown too, they stand beside the last one.

        Its value depends on the image and the base alone: `Backbone.forward` runs the merger, which an adapter changes.
        """
        self.park_tower(self.device)  # that is, have it back
        return self._through_tower(pixel_values, grid_thw)

    def _through_tower(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        pixel_values, grid_thw = pixel_values.to(self.device, self.dtype), grid_thw.to(self.device)
        visual = self._without_mergers()
        return self.family.features(visual, visual(pixel_values, grid_thw=grid_thw), grid_thw)

    def _without_mergers(self) -> Any:
        """The same tower, whose stock forward ends before the mergers. It would run them to no use, and the dropout of
        an adapter in them would draw random numbers.

        A shallow copy, as others may be at work with the original.
        """
        bare = copy.copy(self.model.model.visual)
        bare._modules = dict(bare._modules)
        for name in self.family.mergers:
            merger = bare._modules[name]
            several = isinstance(merger, nn.ModuleList)
            bare._modules[name] = nn.ModuleList(nn.Identity() for _ in merger) if several else nn.Identity()
        return bare

    def park_tower(self, device: torch.device | str = "cpu") -> None:
        """Have the tower's weights elsewhere while they are not needed; `tower` takes them back by itself."""
        for part in self.family.tower:
            getattr(self.model.model.visual, part).to(device)

    @cached_property
    def tower_fingerprint(self) -> str:
        """Hash of everything that decides what `tower` gives for a picture: weights, number format, preprocessing.
        Where there are shapes alone, ""."""
        if self.device.type == "meta":
            return ""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(self.family.tower_prefixes):
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
    def language_model(self) -> Any:
        return self.model.model.language_model

    def compile_layers(self, backend: str = "inductor") -> None:
        """From here on the language layers train by `torch.compile`: what stands between their matrix products is
        computed in few kernels, and the host starts a layer and not each of its operators.

        Layers of a kind share one compilation, which holds for all numbers of rows and tokens (but of one row it is
        another). Without gradients they compute as ever. Call it before `checkpoint_layers`.
        """
        for layer in self.language_model.layers:
            compiled = torch.compile(type(layer).forward, dynamic=True, fullgraph=True, backend=backend)
            layer.forward = partial(_while_training, layer, compiled, layer.forward)
        self.use_compiled(True)

    @property
    def compiled(self) -> bool:
        """Whether the language layers train by `torch.compile` now."""
        return getattr(self.language_model.layers[0], "uses_compiled", False)

    def use_compiled(self, on: bool) -> None:
        """Whether what `compile_layers` has made is used."""
        for layer in self.language_model.layers:
            layer.uses_compiled = on

    def checkpoint_layers(self) -> None:
        """From here on the language layers keep no activations while training, and run again in the backward pass
        (arXiv:1604.06174)."""
        for layer in self.language_model.layers:
            # Around the stock forward: transformers' own switch would drop the prefix, which comes as a cache.
            layer.forward = partial(_run_again, layer, layer.forward)

    def new_cache(self) -> Any:
        """An empty cache of keys and values for `forward`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.text_config)

    @cached_property
    def cache_argument(self) -> str:
        """The name of the cache in transformers' forward: ``cache`` since 5.24, which warns of the older one."""
        return next(n for n in ("cache", "past_key_values") if n in signature(self.language_model.forward).parameters)

    def _after_prefix(
        self, attention_mask: torch.Tensor, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and positions with the prefix before them; an empty cache gets its keys and values."""
        prefix = self.prefix
        count = prefix.keys.shape[2]
        if cache.get_seq_length() == 0:
            for layer, pairs in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                cache.update(*(p.to(self.dtype).expand(len(attention_mask), -1, -1, -1) for p in pairs), layer)
        seen = attention_mask.new_ones(*attention_mask.shape[:-1], count)
        return torch.cat([seen, attention_mask], dim=-1), position_ids + count

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        images: torch.Tensor | Pixels | None,
        past_key_values: Any = None,
        forks: Forks | None = None,
    ) -> torch.Tensor:
        """Last hidden states ``(B, T, hidden)``, through the live merger and the language model's public forward.

        Args:
            input_ids: ``(B, T)``, image placeholders included. Where they are on the CPU, no GPU is waited for.
            attention_mask: boolean ``(B, 1, W, T)``, that of the last ``W`` tokens, those before being causal; or
                ``(B, T)`` of ones and zeros.
            position_ids: ``(3, B, T)``; always given, as the model would work out others for packed rows.
            images: what `tower` gave for all images of the batch in reading order, ``(patches, width)``; or their
                pixels, which go through the tower now, with gradients; None if the input holds no image.
            forks: `Packed`'s, where the mask is 4-D; only families with linear attention look at it.

        Raises:
            IndexError: not as many image placeholders as features.
            ValueError: ``forks`` are missing where they are needed.
        """
        vectors = self.language_model.embed_tokens(input_ids.to(self.device, non_blocking=True))
        shown: dict[str, Any] = {}
        if images is not None:
            features = self._through_tower(*images) if isinstance(images, Pixels) else images
            vectors, shown = self._place_images(vectors, input_ids, features)
        if self.prefix is not None:
            cache = self.new_cache() if past_key_values is None else past_key_values
            attention_mask, position_ids = self._after_prefix(attention_mask, position_ids, cache)
            past_key_values = _read_only(cache) if past_key_values is None else past_key_values
        if attention_mask.ndim == 4:
            # What SDPA makes of a boolean mask, anew in each layer, and keeps for each layer's backward pass.
            added = torch.zeros_like(attention_mask, dtype=self.dtype)
            attention_mask = added.masked_fill_(~attention_mask, float("-inf"))
            if self.family.recurrent:
                if forks is None:
                    raise ValueError("linear attention sees no mask: without forks it would mix what is packed")
                shown["forks"] = forks.map(lambda table: table.to(self.device, non_blocking=True))
        return self.language_model(
            inputs_embeds=vectors,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{self.cache_argument: past_key_values},
            **shown,
        ).last_hidden_state

    def _place_images(
        self, vectors: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The vectors ``(B, T, hidden)`` with those of images in their places, and the arguments that show inner layers
        of the tower."""
        parts = zip(self.family.mergers_of(self.model), features.split(self._tower_width, 1), strict=True)
        merged, *inner = (merger(part.contiguous()).to(vectors.dtype) for merger, part in parts)
        # The stock forward would ask the device how many they are, and its backward pass again.
        where = (input_ids == self.image_token_id).nonzero().T.to(self.device, non_blocking=True)
        places = tuple(where)  # row and column of each
        vectors = vectors.index_put(places, merged)
        if not inner:
            return vectors, {}
        # All rows, with zeros for all that is no image: from a mask of places, the stock forward would have the device
        # count them in each layer.
        empty = torch.zeros_like(vectors)
        return vectors, {
            "visual_pos_masks": torch.arange(len(vectors), device=vectors.device),
            "deepstack_visual_embeds": [empty.index_put(places, each) for each in inner],
        }

    def shard(self, group: Any, device: torch.device) -> None:
        """Keep the language layers' frozen weights in pieces over the processes of ``group``, the rest on ``device``.

        FSDP2 puts a layer together while it computes and takes it apart again. What trains stays whole in each process:
        it is small, and so optimizer, gradient norm and saving know nothing of this. Tower, embeddings and head stay
        whole too.
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


def _while_training(layer: Any, compiled: Callable, plain: Callable, *args: Any, **kwargs: Any) -> Any:
    if layer.uses_compiled and layer.training and torch.is_grad_enabled():
        return compiled(layer, *args, **kwargs)
    return plain(*args, **kwargs)


def _run_again(layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if layer.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def _read_only(cache: Any) -> Any:
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
    preprocessor = read_preprocessor(folder, config, name, min_pixels, max_pixels)
    if preprocessor.family.recurrent:
        kernels.require_sound(name, device)
    try:
        model, report = preprocessor.family.model_class.from_pretrained(
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
    missing = sorted(set(report["missing_keys"]) | set(report["mismatched_keys"]))
    if missing:
        raise ModelError(f"--model {name}: {len(missing)} weights are missing or misshapen, first {missing[0]}.")
    # Packing needs a mask per token pair; eager attention would misread it, flash attention takes none.
    use_packed_attention(model)
    model.requires_grad_(False)
    model = model.to(device).eval()
    if quantise:
        _keep_as_quantised(model)
    return Backbone(
        model=model,
        processor=preprocessor.processor,
        name=name,
        family=preprocessor.family,
        folder=folder,
        quantised=quantise,
    )


WHOLE_LINEARS = ("in_proj_a", "in_proj_b")
"""What QLoRA does not quantise in the language layers: the gates of linear attention, which are a thousandth of the
weights, and where the squared error of four bits is ten times that of the layer's other linears, a weight."""


def require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("Four bits need bitsandbytes, which is not installed: pip install 'vlm-lora[qlora]'.")


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head", *WHOLE_LINEARS],  # by default tower and merger would be, too
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_as_quantised(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks the weights once they are used in eval mode, for a kernel that
    rounds to bfloat16 and knows no gradients, and leaves them so for training and merging. Not so here."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
