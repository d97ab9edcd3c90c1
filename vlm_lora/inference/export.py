"""An adapter made part of its base: a plain checkpoint that any tool loads as it loads the base, and the proof that it
says the same.

The proof is part of it, because merging goes wrong in silence: an adapter that was never applied, one whose small
changes the number format rounds away, a file that is read back as something else.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.images import load_image
from vlm_lora.errors import AdapterError, CheckpointError, ConfigError, ModelError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.card import write_merged_card
from vlm_lora.model.adapters.base import CONTRACT, Adapter, base_of, find_adapter, read_contract, read_settings
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.features import FeatureCache, together
from vlm_lora.model.folder import find_model, has_draft, saved_dtype
from vlm_lora.model.packing import IGNORE_INDEX, pack

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the merged model's logits may be from the adapter's, as a share of their own length; by number format."""

LEAST_EFFECT = 1e-6
"""How far they must at least be from the base's; less is no effect."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` wrote, and how it compares with the adapter on the same images."""

    folder: Path
    """The checkpoint."""
    dtype: str
    """The number format of its weights: "float32", "bfloat16" or "float16"."""
    dequantised: bool
    """Whether the base was in four bits, and no longer is."""
    effect: float
    """The distance between the logits of base and adapter, as a share of the length of the adapter's."""
    error: float
    """The distance between the logits of adapter and merged model, read back from the disk, in the same unit."""
    captions: tuple[tuple[str, str], ...]
    """For each image the captions of the adapter and of the merged model."""


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    images: Sequence[str | Path] = (),
    report: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Write base and LoRA adapter as one plain checkpoint, and prove that it says what the adapter says.

    The folder holds weights, configs, the processor with the adapter's pixel limits, the chat template, a model card,
    and ``contract.json`` with the prompt of the training. An adapter of ``--method qlora`` is merged into the values
    that the base's four bits stand for, as it was trained on them; the result is not in four bits.

    Args:
        adapter: run folder or adapter folder.
        output: the folder to make; it appears whole or not at all.
        model: the base; by default the one that the adapter names.
        dtype: "float32" or "bfloat16"; by default the number format of the base's files.
        images: files to compare the models on; by default pictures of coloured noise.
        report: called with a line for each stage.

    Raises:
        VlmLoraError: the method cannot be merged, ``output`` is in use, the adapter changes nothing, or the merged
            model differs from it by more than rounding.
    """
    folder, target = find_adapter(adapter), Path(output).expanduser()
    _require_possible(adapter, folder, target)
    model, contract = model or base_of(folder), read_contract(folder)
    pictures = [load_image(ImageRef(path=Path(image), name=str(image))) for image in images]
    kept_in = getattr(torch, dtype) if dtype else saved_dtype(model)
    # Where the base is computed in bfloat16, a float32 one must not be rounded to it on the way.
    precision = "auto" if kept_in == torch.bfloat16 else "float32"

    report("Asking base and adapter.")
    captioner = Captioner.load(model, folder, dtype=precision)
    assert captioner.adapter is not None
    asked, limits = {"prompt": captioner.prompt, "system": captioner.system}, captioner.backbone.pixel_limits
    pictures = pictures or _pictures(limits)
    captions = _captions(captioner, pictures)
    tuned = _logits(captioner, pictures, captions)
    with captioner.adapter.switched_off():
        effect = _distance(tuned, _logits(captioner, pictures, captions))
    if not effect > LEAST_EFFECT:
        raise AdapterError(
            f"--adapter {adapter}: has no effect on {model}: with and without it the logits are the same for "
            f"{len(pictures)} images. Nothing was written."
        )
    weights = {name: weight.to("cpu", kept_in) for name, weight in merged_weights(captioner.adapter)}
    del captioner  # two big models at a time may be one too many

    draft = "; the base's draft of further tokens (mtp.*) is left out" if has_draft(find_model(model)) else ""
    report(f"Merging {len(weights)} linear layers{draft}.")
    how = {"dtype": precision, "min_pixels": limits[0], "max_pixels": limits[1]}
    merged = _merged(load_backbone(model, **how), weights, asked)
    errors = {"in memory": _distance(tuned, _logits(merged, pictures, captions))}

    temporary = target.parent / f".{target.name}-{os.getpid()}"
    try:
        report(f"Writing {target}, and reading it back.")
        _write(merged.backbone, kept_in, temporary, adapter=folder, name=target.name)
        del merged
        reloaded = Captioner.load(str(temporary), **asked, **how)
        errors["read back"] = _distance(tuned, _logits(reloaded, pictures, captions))
        _require_same(errors, effect, kept_in)
        captions_again = _captions(reloaded, pictures)
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Merged(
        target,
        str(kept_in).removeprefix("torch."),
        contract is not None and contract.method == "qlora",
        effect,
        errors["read back"],
        tuple(zip(captions, captions_again, strict=True)),
    )


def _require_possible(adapter: str | Path, folder: Path, target: Path) -> None:
    """Raise `VlmLoraError` if the method cannot be merged, or the target is in use."""
    method = read_settings(folder).get("method")
    if method is not None:
        raise AdapterError(
            f"--adapter {adapter}: --method {method} adds to the model and changes no weights of it, so it cannot be "
            "merged. Use it as an adapter, or train with --method lora."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already and not empty. Give a folder that is to be made.")
    if target.exists() and os.path.samefile(target, os.getcwd()):
        raise ConfigError(f"{target}: is the folder you are in, which cannot be replaced. Give another one.")


@torch.no_grad()
def _merged(backbone: Backbone, weights: dict[str, torch.Tensor], asked: dict[str, str]) -> Captioner:
    for name, weight in weights.items():
        backbone.model.get_parameter(name).copy_(weight)
    return Captioner(backbone, None, FeatureCache(backbone, None), **asked)


def _write(backbone: Backbone, dtype: torch.dtype, folder: Path, *, adapter: Path, name: str) -> None:
    model, processor = backbone.model.to(dtype), backbone.processor
    assert isinstance(model, PreTrainedModel)
    assert isinstance(processor, ProcessorMixin)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, max_shard_size="5GB")
    # The template says by itself what it was told in training, for servers that are not told. All of it is "false", and
    # the name stands after it too, as transformers takes what a template names for its options, and warns of others.
    options = backbone.family.template_options
    said = "".join(f"{{%- set {name} = {json.dumps(value)} and {name} %}}\n" for name, value in options.items())
    template = str(processor.chat_template)
    if not template.startswith(said):
        processor.chat_template = said + template
    processor.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for their owner alone; an engine may be another user
        shutil.copymode(folder / "config.json", file)
    if contract := read_contract(adapter):  # the prompt is nowhere else in a checkpoint
        shutil.copy(adapter / CONTRACT, folder)
        write_merged_card(folder, contract, name)


def _require_same(errors: dict[str, float], effect: float, dtype: torch.dtype) -> None:
    """Raise `ModelError` if the logits of the merged model, where ``errors`` says, are too far from the adapter's."""
    for where, error in errors.items():
        if not error < min(TOLERANCE[dtype], effect / 2):
            hint = " Try --dtype float32." if dtype != torch.float32 else ""
            raise ModelError(
                f"The merged model, {where}, does not do what the adapter does: its logits are {100 * error:.3g} % "
                f"away, and the adapter moves them by {100 * effect:.3g} %.{hint} Nothing was written."
            )


@torch.no_grad()
def merged_weights(adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    """Name, as in the base model, and float32 weight ``(out, in)`` of each linear that is not the base's once the
    adapter is part of it.

    Over a base in four bits that is every linear kept in them, adapted or not, with the values the four bits stand for:
    the adapter was trained on those.

    Raises:
        AdapterError: something else than a linear is adapted; another tool's adapter may.
    """
    modules: dict[str, Any] = dict(adapter.backbone.model.named_modules())
    for name, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper):
            raise AdapterError(f"{name} is replaced as a whole (modules_to_save); only LoRA of linears can be merged.")
        adapted = isinstance(modules[name], LoraLayer)
        base = module.get_base_layer() if adapted else module
        quantised = getattr(getattr(base, "weight", None), "quant_state", None) is not None
        if name.endswith(".base_layer") or not (adapted or quantised):
            continue
        if not isinstance(base, torch.nn.Linear):
            raise AdapterError(f"{name} is adapted, a {type(base).__name__}; only linear layers can be merged.")
        weight = dequantize_module_weight(base).float()
        if adapted:
            weight = weight + module.get_delta_weight("default").float()
            if "default" in module.lora_magnitude_vector:  # DoRA: each output's weights brought to a learnt length
                length = torch.linalg.vector_norm(weight, dim=1)
                weight = weight * (module.lora_magnitude_vector["default"].weight.float() / length)[:, None]
        yield f"{name}.weight", weight


def _pictures(limits: tuple[int, int]) -> list[Image.Image]:
    side = max(32, min(448, int(limits[1] ** 0.5)))
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8, generator=draw)
    return [Image.fromarray(c.numpy()).resize((side, side), Image.Resampling.BICUBIC) for c in coarse]


def _captions(captioner: Captioner, pictures: Sequence[Image.Image]) -> list[str]:
    return [caption.text or "" for caption in captioner.caption(pictures, decoding=Decoding(max_new_tokens=32))]


@torch.no_grad()
def _logits(captioner: Captioner, pictures: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
    """``(tokens, vocabulary)``: what is expected at each token of these captions, one image after the other."""
    backbone = captioner.backbone
    logits = []
    for picture, text in zip(pictures, texts, strict=True):
        (entry,) = captioner.features.get([picture])
        said = Dialogue((Turn(captioner.prompt, text),), system=captioner.system)
        encoded = captioner.encoder.encode([said], entry.grid_thw[None])
        row = pack([[encoded]], backbone.pad_token_id)
        mask, positions = (tensor.to(backbone.device) for tensor in (row.attention_mask, row.position_ids))
        seen = together([entry], backbone.device)
        hidden = backbone.forward(row.input_ids, mask, positions, seen, forks=row.forks)
        labelled = (row.labels[:, 1:] != IGNORE_INDEX).to(backbone.device)
        logits.append(backbone.logits(hidden[:, :-1][labelled]).float().cpu())
    return torch.cat(logits)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()
