"""Adapters and merged checkpoints on the model hub: what goes up, and nothing that tells of the machine it is from."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_lora.errors import AdapterError, ConfigError, VlmLoraError
from vlm_lora.inference.card import CARD, is_hub_name, without_paths
from vlm_lora.model.adapters.base import CONFIG, CONTRACT, WEIGHTS, find_adapter

ADAPTER_FILES = (CONFIG, WEIGHTS, CONTRACT, CARD)
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", CARD)
NAMES_OF_BASES = ("base", "base_model_name_or_path", "_name_or_path", "name_or_path")
"""Keys in JSON files whose value may be a base model's folder."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as it goes up: its name there, and its bytes, or where they are."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def changed(self) -> bool:
        """Whether it differs from the file on the disk."""
        return isinstance(self.content, bytes)


def uploads(source: str | Path, repository: str) -> list[Upload]:
    """The files of a run's adapter, of an adapter folder or of a merged checkpoint, as they go up to ``repository``.

    Folders of this machine in them become their last names.

    Raises:
        AdapterError: ``source`` is none of these.
    """
    folder = Path(source).expanduser()
    if any((folder / name / CONFIG).is_file() for name in (".", "adapter")):
        patterns, folder = ADAPTER_FILES, find_adapter(source)
    elif (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        patterns = CHECKPOINT_FILES
    else:
        raise AdapterError(
            f"{source}: is neither a run folder, nor an adapter folder, nor a merged checkpoint; there is nothing to "
            "upload in it."
        )
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return [Upload(file.name, _content(file, repository)) for file in sorted(files)]


def base_left_behind(files: list[Upload]) -> str | None:
    """The last name of the base's folder, where the base is one of this machine: whoever takes the adapter needs it."""
    for file in files:
        if file.name == CONTRACT and isinstance(file.content, bytes):
            return str(json.loads(file.content)["base"])
    return None


def push(files: list[Upload], repository: str, *, public: bool = False) -> str:
    """Upload files in one commit; the repository's address. A new one is private, or else ``public``.

    Raises:
        ConfigError: the hub refused, there is no token for it, or others can read the repository and ``public`` is not
            asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    operations = [CommitOperationAdd(file.name, file.content) for file in files]
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise ConfigError(
                f"{repository} is there already and anybody can read it. Say --public if that is meant, or give "
                "another name. Nothing was uploaded."
            )
        api.create_commit(repository, operations, commit_message="Uploaded by vlm-lora")
    except (OSError, HFValidationError) as error:  # the hub's own errors, and a missing token, are OSErrors
        raise ConfigError(f"{repository}: cannot be uploaded: {' '.join(str(error).split())[:300]}") from error
    return str(address)


def listing(files: list[Upload]) -> Iterator[str]:
    """A line for each file: its size, its name, and whether it goes up changed."""
    for file in files:
        yield f"{file.size:>15,}  {file.name}{'  (without the paths of this machine)' if file.changed else ''}"


def _content(file: Path, repository: str) -> Path | bytes:
    """The file itself, or what goes up in its place."""
    if file.name != CARD and file.suffix != ".json":
        return file
    try:
        text = file.read_text(encoding="utf-8")
        new = _card(text, repository) if file.name == CARD else _json(text)
    except (OSError, ValueError) as error:
        raise VlmLoraError(f"{file}: cannot be read ({error}).") from error
    return file if new == text else new.encode()


def _json(text: str) -> str:
    content = json.loads(text)
    if not isinstance(content, dict):
        return text
    bases = {key: content[key] for key in NAMES_OF_BASES if isinstance(content.get(key), str)}
    local = {key: Path(base).name for key, base in bases.items() if not is_hub_name(base) and base != Path(base).name}
    return json.dumps(content | local, indent=2, ensure_ascii=False) + "\n" if local else text


def _card(text: str, repository: str) -> str:
    text = re.sub(r'Captioner\.load\(adapter="[^"]*"', f'Captioner.load(adapter="{repository}"', text)
    return re.sub(r'Captioner\.load\("[^"]*"', f'Captioner.load("{repository}"', without_paths(text))
