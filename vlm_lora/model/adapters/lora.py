"""LoRA (arXiv:2106.09685) on every linear of the language layers and on the merger's two, as a plain PEFT
adapter.

QLoRA (arXiv:2305.14314) is the same on a base whose language linears are kept in four bits; `load_backbone`
sees to that. The variants: ``rslora`` scales by alpha over the root of the rank (arXiv:2312.03732), ``dora``
also learns each output's magnitude (arXiv:2402.09353), both PEFT's; ``pissa`` starts from the base's
principal parts (arXiv:2404.02948). PEFT takes these out of the base's weights, so that switched off it would
not be the base; here the base stays whole and the start is subtracted beside it: LoRA of twice the rank, one
half frozen, which is what PEFT itself converts such an adapter to.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from vlm_lora.errors import AdapterError
from vlm_lora.model.adapters.base import (
    CONFIG,
    WEIGHTS,
    Adapter,
    Contract,
    check_contract,
    new_contract,
    read_settings,
)
from vlm_lora.model.backbone import LANGUAGE_LINEARS, MERGER_LINEARS, TOWER_PREFIXES, Backbone

TARGETS = {"language": LANGUAGE_LINEARS, "projector": MERGER_LINEARS}


def attach_lora(
    backbone: Backbone,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    prompt: str,
    variant: str = "plain",
    targets: Sequence[str] = ("language", "projector"),
    method: str = "lora",
) -> Adapter:
    """Freeze the base and add LoRA; the tensors' first values come from ``seed``.

    Raises:
        AdapterError: a part of the vision tower would train, or one of ``targets`` was not found.
    """
    halves = 2 if variant == "pissa" else 1
    config = LoraConfig(
        r=halves * rank,
        lora_alpha=halves * alpha,
        lora_dropout=dropout,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        target_modules="|".join(f"(?:{TARGETS[target]})" for target in targets),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
        torch.manual_seed(seed)
        peft_model = get_peft_model(backbone.model, config)
    if variant == "pissa":
        _start_from_principal_parts(peft_model, rank, alpha / rank)
    # The name the user knows it by, which may be the hub's, and not the folder it happened to be loaded from.
    peft_model.peft_config["default"].base_model_name_or_path = backbone.name
    adapter = _adapter(backbone, peft_model, new_contract(backbone, method, prompt))
    check_trained(adapter, targets)
    return adapter


@torch.no_grad()
def _start_from_principal_parts(peft_model: PeftModel, rank: int, scaling: float) -> None:
    """LoRA's first ``rank`` rows and columns are the base's largest singular parts, the rest minus the same,
    frozen.
    """
    for module in peft_model.modules():
        if not isinstance(module, LoraLayer):
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        weight = module.get_base_layer().weight
        left, parts, right = torch.linalg.svd(weight.to(down.dtype), full_matrices=False)
        root = (parts[:rank] / scaling).sqrt()
        first = min(rank, len(parts))
        down.zero_()
        up.zero_()
        down[:first] = down[rank : rank + first] = root[:, None] * right[:rank]
        up[:, :first] = left[:, :rank] * root
        up[:, rank : rank + first] = -up[:, :first]
        down.register_hook(lambda grad: torch.cat([grad[:rank], torch.zeros_like(grad[rank:])]))
        up.register_hook(lambda grad: torch.cat([grad[:, :rank], torch.zeros_like(grad[:, rank:])], dim=1))


def _adapter(backbone: Backbone, peft_model: PeftModel, contract: Contract | None) -> Adapter:
    def write(folder: Path) -> None:
        # "auto" would ask the hub whether the vocabulary has changed; embeddings are never trained here.
        peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    return Adapter(backbone, contract, peft_model.disable_adapter, write)


def check_trained(adapter: Adapter, targets: Sequence[str]) -> None:
    """Raises `AdapterError` unless LoRA sits in each of ``targets``, and nothing else trains."""
    trained = [name for name, _ in adapter.named_parameters()]
    strays = [name for name in trained if name.startswith(TOWER_PREFIXES) or ".lora_" not in name]
    if strays:
        raise AdapterError(f"{len(strays)} tensors would train that must not, first {strays[0]}.")
    for target in targets:
        if not any(re.match(TARGETS[target], name) for name in trained):
            raise AdapterError(
                f"No linear layer of the {target} was found to adapt in {adapter.backbone.name}: nothing "
                "there would be learnt. This is not a checkpoint layout that vlm-lora knows."
            )


def load_lora(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved adapter, ready for inference.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, or any key is without its counterpart.
    """
    config = read_settings(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; expected 'LORA'.")
    if config.get("megatron_config"):
        raise AdapterError(f"{folder / CONFIG}: asks for a module to be imported (megatron_config); refused.")
    contract = check_contract(backbone, folder)
    if contract and (contract.method == "qlora") != backbone.quantised:
        kept = "in four bits" if backbone.quantised else "unquantised"
        raise AdapterError(f"{folder}: was trained by --method {contract.method}; the base is loaded {kept}.")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of unmatched keys; they are an error below
            peft_model = PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=False)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise AdapterError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if saved != expected:
        odd = sorted(saved ^ expected)
        raise AdapterError(
            f"{folder}: {len(odd)} of its tensors and the base model's do not match, first {odd[0]}. It was "
            f"made for another model than {backbone.name}."
        )
    peft_model.eval()
    return _adapter(backbone, peft_model, contract)
