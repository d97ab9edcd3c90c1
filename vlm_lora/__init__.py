"""Teach a Qwen-VL model your own pictures.

The public names load on first use, so that ``import vlm_lora`` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_lora.version import __version__ as __version__

if TYPE_CHECKING:
    from vlm_lora.config import TrainConfig
    from vlm_lora.data.example import Box, Dialogue, Example, ImageRef, Turn
    from vlm_lora.data.images import load_image
    from vlm_lora.data.readers import Dataset, DataSettings, read_dataset
    from vlm_lora.errors import VlmLoraError
    from vlm_lora.inference.caption import Caption, Decoding
    from vlm_lora.inference.captioner import Captioner
    from vlm_lora.inference.evaluate import evaluate
    from vlm_lora.inference.evaluation import Evaluation
    from vlm_lora.inference.export import Merged, merge
    from vlm_lora.inference.losses import Losses, read_losses
    from vlm_lora.inference.report import show_answer, show_evaluation, show_learning
    from vlm_lora.inference.scores import Scores
    from vlm_lora.run import RunResult, train

_HOMES = {
    "TrainConfig": "config",
    "Box": "data.example",
    "Dialogue": "data.example",
    "Example": "data.example",
    "ImageRef": "data.example",
    "Turn": "data.example",
    "load_image": "data.images",
    "DataSettings": "data.readers",
    "Dataset": "data.readers",
    "read_dataset": "data.readers",
    "VlmLoraError": "errors",
    "Caption": "inference.caption",
    "Captioner": "inference.captioner",
    "Decoding": "inference.caption",
    "Evaluation": "inference.evaluation",
    "evaluate": "inference.evaluate",
    "Merged": "inference.export",
    "merge": "inference.export",
    "Losses": "inference.losses",
    "read_losses": "inference.losses",
    "show_answer": "inference.report",
    "show_evaluation": "inference.report",
    "show_learning": "inference.report",
    "Scores": "inference.scores",
    "RunResult": "run",
    "train": "run",
}

__all__ = [
    "Box", "Caption", "Captioner", "DataSettings", "Dataset", "Decoding", "Dialogue", "Evaluation", "Example",
    "ImageRef", "Losses", "Merged", "RunResult", "Scores", "TrainConfig", "Turn", "VlmLoraError", "evaluate",
    "load_image", "merge", "read_dataset", "read_losses", "show_answer", "show_evaluation", "show_learning", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
