"""The model card beside an adapter: README.md with the hub's metadata, what it was trained on, and how it scores."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from vlm_lora import __version__
from vlm_lora.config import TrainConfig
from vlm_lora.inference.evaluate import headline, metric_text, span
from vlm_lora.inference.report import NAMES, summary
from vlm_lora.model.adapters.base import read_contract
from vlm_lora.model.folder import tiny_path

TASK = "image-text-to-text"
CARD = "README.md"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

PAGE = """\
---
{metadata}
---

# {name}

An adapter ({method}) for {base}, trained with vlm-lora {version}. It answers the prompt it was trained
with, "{prompt}", about an image.

```python
from vlm_lora import Captioner

captioner = Captioner.load(adapter="{name}")
print(captioner.answer("photo.jpg", "{prompt}"))
```

{scores}
## What it was trained on

- Data: {data}; {counts}. Fingerprint `{fingerprint}`.
- Prompt: "{prompt}"
- Images of {min_pixels:,} to {max_pixels:,} pixels; larger and smaller ones are resized to that.
- Base: {base}, {tower_state}, in {dtype} (fingerprints: language `{language}`, tower `{tower}`).
- Settings: {settings}.
- Command: `{command}`
- Versions: {versions}.

## Limits

It has seen the data above and no other: what it says of other kinds of pictures may be worse than what its base says
(`vlm-lora eval --also DATA` measures it). It can be wrong with confidence, and it repeats whatever slant its data and
its base have. Another prompt, or other pixel limits, than it was trained with give other answers.

## Licence

An adapter is made from its base, whose licence holds: {licence}. The data may add conditions of its own.
"""


def write_card(
    folder: Path,
    config: TrainConfig,
    *,
    name: str,
    data: str,
    counts: str,
    fingerprint: str,
    command: str,
    scores: dict | None,
) -> Path:
    """Write README.md into an adapter folder.

    Args:
        config: of the run that made the adapter.
        name: what the adapter is called, such as its run folder's name.
        data: the data's name; a path would tell readers about the machine.
        counts: images, answers and what was left out, in words.
        scores: of an `Evaluation` on the held-out part of the data; None if there was none.
    """
    contract = read_contract(folder)
    assert contract is not None, "train writes the contract"
    on_hub = HUB_NAME.fullmatch(contract.base) is not None and not Path(contract.base).exists()
    licence = _licence(contract.base)
    card_data = ModelCardData(
        library_name="peft" if contract.method in ("lora", "qlora") else "vlm-lora",  # what can load it
        pipeline_tag=TASK,
        base_model=contract.base if on_hub else None,
        license=licence,
        tags=["vlm-lora", contract.method],
        model_name=name,
        eval_results=_results(scores, f"{data}, held out") if scores else None,
    )
    text = PAGE.format(
        metadata=card_data.to_yaml(),
        name=name,
        base=f"`{contract.base if on_hub else Path(contract.base).name}`",
        method=contract.method,
        version=__version__,
        prompt=contract.prompt.replace('"', "'"),
        scores=_section(scores, f"{data}, held out") if scores else "",
        data=data,
        counts=counts,
        fingerprint=fingerprint[:16],
        min_pixels=contract.min_pixels,
        max_pixels=contract.max_pixels,
        dtype=contract.dtype,
        language=contract.base_fingerprint[:16],
        tower=contract.tower_fingerprint[:16],
        tower_state="its vision tower adapted too" if "vision" in config.lora_targets else "its vision tower frozen",
        settings="; ".join(f"{knob.replace('_', ' ')} {value}" for knob, value in config.method_settings.items()),
        command=command.replace("`", "'"),
        versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
        + f", Python {platform.python_version()}",
        licence=licence or "see the base model's own page or folder",
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def update_card(folder: Path, scores: dict, data: str) -> Path | None:
    """Put the scores on ``data`` into the card, in place of earlier ones on it; None if there is no card of ours."""
    path = folder / CARD
    if not path.is_file() or not os.access(path, os.W_OK):
        return None
    card = ModelCard(path.read_text(encoding="utf-8"))
    if "vlm-lora" not in (card.data.tags or []):
        return None
    others = [result for result in card.data.eval_results or [] if result.dataset_name != data]
    card.data.eval_results = others + _results(scores, data)
    card.data.model_name = card.data.model_name or folder.absolute().parent.name
    section = _section(scores, data)
    old = re.compile(re.escape(section.partition("\n")[0]) + r"\n.*?<!-- end -->\n\n", re.DOTALL)
    text = old.sub("", card.text)
    card.text = text.replace("## What it was trained on\n", section + "## What it was trained on\n", 1)
    path.write_text(str(card), encoding="utf-8")
    return path


def _results(scores: dict, data: str) -> list[EvalResult]:
    """The metrics of the tuned model, as the hub's model-index lists them."""
    slug = re.sub(r"[^\w-]+", "-", data).strip("-").lower() or "data"
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=slug,
            dataset_name=data,
            metric_type=metric,
            metric_name=NAMES[metric],
            metric_value=round(scores["tuned"][metric], 6),
        )
        for metric in NAMES
    ]


def _section(scores: dict, data: str) -> str:
    lines = [f"## On {' '.join(data.split())}", "", *summary(scores), ""]
    lines += ["| | base | tuned | gain (95 % interval) |", "|---|---|---|---|"]
    for metric in headline(scores):
        gain = scores["gain"].get(metric)
        told = metric_text(metric, gain["gain"], points=True, sign=True) if gain else ""
        told += f" ({span(metric, gain['low'], gain['high'], sign=True)})" if gain else ""
        values = [metric_text(metric, scores[who][metric]) for who in ("base", "tuned")]
        lines.append(f"| {' | '.join([NAMES[metric], *values, told])} |")
    lines += ["", f"{scores['examples']:,} images, {scores['answers']:,} questions; `{scores['tokens']}` tokens.", ""]
    return "\n".join([*lines, "<!-- end -->", "", ""])


def _licence(base: str) -> str | None:
    """The licence that the base's own card names; None where it has no card, or the hub cannot be asked."""
    folder = tiny_path() if base == "tiny" else Path(base).expanduser()
    try:
        return ModelCard.load(folder / CARD if folder.is_dir() else hf_hub_download(base, CARD)).data.license
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
