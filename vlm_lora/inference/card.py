"""The model card beside an adapter: README.md with the hub's metadata, what it was trained on, and how it scores."""

import json
import os
import platform
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from vlm_lora.config import HUB_NAME, TrainConfig
from vlm_lora.inference.pages import render
from vlm_lora.inference.scores import METRICS, TASKS, Scores
from vlm_lora.inference.verdict import LEGEND, counts, score_table, summary
from vlm_lora.model.adapters.base import Contract, read_contract
from vlm_lora.model.folder import tiny_path
from vlm_lora.version import __version__

TASK = "image-text-to-text"
CARD = "README.md"


def write_card(  # arguments: what a card tells, each of another origin
    folder: Path,
    config: TrainConfig,
    *,
    counts: str,
    fingerprint: str,
    command: str,
    scores: Scores | None,
    template_options: Mapping[str, Any],
    against_parent: str = "",
) -> Path:
    """Write README.md into the adapter folder of a run.

    Args:
        config: of the run.
        counts: images, answers and what was left out, in words.
        fingerprint: of the data.
        command: what the run was started with.
        scores: on the held-out part of the data; None if there are none.
        against_parent: what the run gained over the one that it goes on from, in a sentence; "" if from none.
        template_options: what the chat template was told, and must be by whoever asks.
    """
    contract = read_contract(folder)
    assert contract is not None, "train writes the contract"
    on_hub = is_hub_name(contract.base)
    # A path would tell readers about the machine.
    data = ", ".join(source if source.startswith("hf") else Path(source).name for source in config.sources)
    name, licence = folder.absolute().parent.name, _licence(contract.base)
    metadata = ModelCardData(
        library_name="peft" if contract.method in ("lora", "qlora") else "vlm-lora",  # what can load it
        pipeline_tag=TASK,
        base_model=contract.base if on_hub else None,
        license=licence,
        tags=["vlm-lora", contract.method],
        model_name=name,
        eval_results=_results(scores, f"{data}, held out") if scores else None,
    )
    versions = [f"{package} {version(package)}" for package in ("torch", "transformers", "peft")]
    text = render(
        "card.md",
        metadata=metadata.to_yaml(),
        name=name,
        data=data,
        counts=counts,
        against_parent=against_parent,
        config=config,
        fingerprint=fingerprint,
        command=shlex.join(map(_without_path, shlex.split(command))),
        contract=contract,
        base=f"`{contract.base if on_hub else Path(contract.base).name}`",
        prompt=contract.prompt.replace('"', "'"),
        template_options=json.dumps(dict(template_options)) if template_options else "",
        scores=_section(scores, f"{data}, held out") if scores else "",
        licence=licence,
        version=__version__,
        versions=", ".join([*versions, f"Python {platform.python_version()}"]),
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def write_merged_card(folder: Path, contract: Contract, name: str) -> None:
    """Write README.md into the folder of a merged checkpoint."""
    on_hub, licence = is_hub_name(contract.base), _licence(contract.base)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        base_model=contract.base if on_hub else None,
        license=licence,
        tags=["vlm-lora", contract.method],
        model_name=name,
    )
    text = render(
        "merged.md",
        metadata=metadata.to_yaml(),
        name=name,
        base=f"`{contract.base if on_hub else Path(contract.base).name}`",
        contract=contract,
        prompt=contract.prompt.replace('"', "'"),
        licence=licence,
        version=__version__,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def update_card(folder: Path, scores: Scores, data: str) -> Path | None:
    """Put the scores on ``data`` into the card, in place of earlier ones on it; None if there is no card of ours."""
    path = folder / CARD
    if not path.is_file() or not os.access(path, os.W_OK):
        return None
    card = ModelCard(path.read_text(encoding="utf-8"))
    metadata = card.data
    assert isinstance(metadata, ModelCardData)
    if "vlm-lora" not in (metadata.tags or []):
        return None
    others = [result for result in metadata.eval_results or [] if result.dataset_name != data]
    metadata.eval_results = others + _results(scores, data)
    metadata.model_name = metadata.model_name or folder.absolute().parent.name
    section = _section(scores, data)
    old = re.compile(re.escape(section.partition("\n")[0]) + r"\n.*?<!-- end -->\n\n", re.DOTALL)
    text = old.sub("", card.text)
    card.text = text.replace("## What it was trained on\n", section + "## What it was trained on\n", 1)
    path.write_text(str(card), encoding="utf-8")
    return path


def is_hub_name(base: str) -> bool:
    """Whether a base is a model of the hub, and no folder here."""
    return HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def without_paths(text: str) -> str:
    """The text with the last part alone of each path that tells about the machine: from the root, home or upwards."""
    return _PATH.sub(lambda found: Path(found.group()).name, text)


_PATH = re.compile(
    r"(?<![\w/.:~<-])(?:~[\w.-]*|\.\.)?(?:/[\w.@+~-]+){2,}/?|(?<![\w/.:~<-])(?:~[\w.-]*|\.\.)/[\w.@+~-]+/?"
)
"""Not what follows a scheme, a host or a word, as in ``https://host/page`` and ``runs/photos``."""


def _without_path(argument: str) -> str:
    """One argument of a command, without the path of a folder that is not below the one the command ran in."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    local = value.startswith(("/", "~", "../")) and "\n" not in value
    return flag + equals + (Path(value).name if local else value)


def _results(scores: Scores, data: str) -> list[EvalResult]:
    """The metrics of the tuned model, as the hub's model-index lists them."""
    slug = re.sub(r"[^\w-]+", "-", data).strip("-").lower() or "data"
    several = len(scores.tasks) > 1
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=slug,
            dataset_name=data,
            metric_type=key,
            metric_name=f"{METRICS[key].title}, {TASKS[task].noun}" if several else METRICS[key].title,
            metric_value=round(of.scores["tuned"][key], 6),
        )
        for task, of in scores.tasks.items()
        for key in of.metrics
    ]


def _section(scores: Scores, data: str) -> str:
    """The part of the card that tells the scores on ``data``."""
    lines = [f"## On {' '.join(data.split())}", "", *(line.replace("<", "&lt;") for line in summary(scores)), ""]
    for task, of in scores.tasks.items():
        lines += [f"### {TASKS[task].title}", ""] if len(scores.tasks) > 1 else []
        lines += [score_table(of).to_markdown(), "", f"{counts(task, of)}; `{scores.tokens}` tokens.", ""]
    return "\n".join([*lines, f"In brackets: {LEGEND}.", "", "<!-- end -->", "", ""])


def _licence(base: str) -> str | None:
    """The licence that the base's own card names; None where it has no card, or the hub cannot be asked."""
    folder = tiny_path() if base == "tiny" else Path(base).expanduser()
    try:
        metadata = ModelCard.load(folder / CARD if folder.is_dir() else hf_hub_download(base, CARD)).data
        assert isinstance(metadata, ModelCardData)
        return metadata.license
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
