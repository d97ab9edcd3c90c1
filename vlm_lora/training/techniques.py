"""What makes training what it is, to be exchanged where its worth is measured (`bench/`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone
from vlm_lora.training.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Techniques:
    """Without one of the first three training takes longer, and learns the same numbers."""

    shared_prefix: bool = True
    """All answers of an image share one copy of its tokens; else each has a row of its own."""
    label_logits: bool = True
    """Logits where there are labels; else for every token."""
    features_in_memory: bool = True
    """Features that were read lately stay in main memory."""
    schedule: Callable[[TrainConfig, Sequence[int] | np.ndarray], Schedule] = Schedule.of
    attach: Callable[[Backbone, TrainConfig], Adapter] = attach_adapter


ALL = Techniques()
"""As everybody trains."""
