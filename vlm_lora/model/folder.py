"""Folders of base models: found or downloaded, checked before anything in them is loaded, and told apart."""

import hashlib
import json
import re
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm_lora.config import DEFAULT_MODEL
from vlm_lora.errors import ModelError, VlmLoraError
from vlm_lora.model.families import FAMILIES

LAYOUTS = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?")
"""What stands before a weight's name in the files of one release of transformers and not in those of another."""

PUBLISHED = tuple(f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B"))
PUBLISHED += tuple(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B"))
PUBLISHED += tuple(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B"))
"""Names on the hub that a mistyped one may mean."""

REPAIR = " Download the base model again."


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
    meant = get_close_matches(name, ["tiny", *PUBLISHED], n=1, cutoff=0.7)
    hint = f" Did you mean {meant[0]}?" if meant and meant[0] != name else ""
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"--model {name}: there is no such folder, and a hub name looks like 'owner/name'.{hint} "
            "Give a folder that holds config.json and *.safetensors, or --model tiny (embedded, needs no network)."
        )
    try:
        require_known(read_json(from_hub(name, ["config.json"]) / "config.json"), name)  # before gigabytes of weights
        return from_hub(name, ["*.json", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else []))
    except LookupError as error:
        raise ModelError(
            f"--model {name}: is not on this machine, and {error}.{hint} "
            "Without a network use --model tiny (embedded), or give the folder of a copy: --model path/to/folder."
        ) from error


def from_hub(name: str, patterns: list[str]) -> Path:
    """A local copy of these files of a repository on the model hub. Raises LookupError with what is in the way."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LookupError(_in_the_way(error)) from error


def _in_the_way(error: Exception) -> str:
    """Why the hub gave nothing, as the end of a sentence."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE forbids a download"
    if isinstance(error, GatedRepoError):
        return "the model hub gives it only to those who asked for access on its page and logged in (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "the model hub has no repository of this name that you may see (a private one needs: hf auth login)"
    if answered := next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None):
        return f"the model hub answered with an error ({answered.response.status_code}); try again later"
    if isinstance(error, OSError) and error.errno:
        return f"it cannot be downloaded ({error.strerror})"
    return "the model hub cannot be reached: there is no network, or a proxy is in the way"


def require_known(config: dict, name: str) -> None:
    """Raises ModelError where a ``config.json`` is not that of a family that is known here."""
    if str(config.get("model_type")) not in FAMILIES:
        raise ModelError(
            f"--model {name}: is a model of another family (model_type {config.get('model_type')!r}). "
            f"Expected one of {', '.join(FAMILIES)}, such as {DEFAULT_MODEL}."
        )


def read_json(file: Path, wrong: type[VlmLoraError] = ModelError, advice: str = REPAIR) -> dict:
    """The object in a JSON file, a dictionary.

    Raises:
        wrong: it cannot be read, or holds something else; the message ends in ``advice``.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"{file}: cannot be read ({error}).{advice}") from error
    if not isinstance(content, dict):
        raise wrong(f"{file}: holds {str(content)[:20]!r}; expected {{...}}.{advice}")
    return content


def _weight_map(index: Path) -> dict:
    """Which file each weight is in."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: weight_map is {str(weight_map)[:20]!r}; expected {{weight: file, ...}}.")
    return weight_map


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers loads."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    return sorted({folder / part for part in _weight_map(folder / "model.safetensors.index.json").values()})


def _asks_for_code(file: Path) -> bool:
    """Whether there is an ``auto_map`` at any depth: transformers would import the modules that it names."""
    waiting: list[Any] = [read_json(file)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "auto_map" in value:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def check_model_folder(folder: Path, name: str, *, weights: bool = True) -> dict:
    """The folder's ``config.json``, once it is sure that loading the folder runs no code and opens no pickle.

    Raises:
        ModelError: it is not sure, or this is no base model that is known here.
    """
    if not (folder / "config.json").exists():
        raise ModelError(
            f"--model {name}: {folder} holds no config.json. "
            "A base model's folder holds config.json, tokenizer files and *.safetensors. A run or an adapter goes with "
            "--adapter (in Python adapter=)."
        )
    config = read_json(folder / "config.json")
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
    require_known(config, name)
    if any(isinstance(part, dict) and part.get("quantization_config") for part in (config, config.get("text_config"))):
        raise ModelError(
            f"--model {name}: is quantised already. Give the plain checkpoint; --method qlora keeps it in four bits."
        )
    if weights and not any(folder.glob("*.safetensors")):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ModelError(f"--model {name}: {folder} holds no *.safetensors weights (it holds {there}).")
    return config


def saved_dtype(name: str) -> torch.dtype:
    """The number format that a base model's files are in, as its config.json says; float32 if it does not."""
    config = check_model_folder(find_model(name), name)
    saved = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return getattr(torch, str(saved), torch.float32)


def fingerprint(folder: Path) -> str:
    """What tells one base from another: a hash of its weights' names and shapes, then one of a row of each weight.

    It is taken from the files. So neither how they were loaded (number format, four bits, in pieces) nor the release
    of transformers is in it, and a copy in a wider number format is the same base.
    """
    shapes, values = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
        weights = {LAYOUTS.sub("", name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118
        for plain, (file, name) in sorted(weights.items()):
            if plain == "lm_head.weight" or plain.startswith("mtp.") or not plain.endswith((".weight", ".bias")):
                continue  # some copies have the head, where it is the embeddings again, and Qwen3.5's draft of tokens
            weight = file.get_slice(name)
            shape = weight.get_shape()
            shapes.update(f"{plain} {shape}".encode())
            middle = shape[0] // 2
            part = weight[middle : middle + 1] if len(shape) > 1 else weight[:]
            values.update(part.float().contiguous().numpy().data)
    return shapes.hexdigest()[:32] + values.hexdigest()[:32]


def has_draft(folder: Path) -> bool:
    """Whether its files hold a draft of further tokens (``mtp.*``), which transformers does not load."""
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
        return any(name.startswith("mtp.") for file in files for name in file.keys())  # noqa: SIM118


def cannot_be_loaded(name: str, folder: Path, error: Exception) -> ModelError:
    """The error to raise where transformers gives up on a folder: its own words, in one line."""
    return ModelError(f"--model {name}: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}")
