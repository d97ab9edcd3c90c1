"""TensorBoard, Weights & Biases and trackio, through accelerate."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vlm_lora.config import TrainConfig
from vlm_lora.errors import ConfigError


def require_tracker(report_to: str | None) -> None:
    """Raises ConfigError if it is not installed."""
    if report_to and report_to not in map(str, get_available_trackers()):
        raise ConfigError(f"--report-to {report_to}: is not installed: pip install {report_to}.")


@contextmanager
def tracked(config: TrainConfig, accelerator: Accelerator, folder: Path, resume: bool) -> Iterator[None]:
    """Inside, what is logged goes to the tracker too. It starts before the model is loaded, so that nobody finds out
    hours later that they are not logged in.

    A resumed run continues in the same tracker run: Weights & Biases notes in the run folder which one that is, and
    forgets it when the run has ended well.
    """
    if config.report_to is None:
        yield
        return
    own = {
        "wandb": {"name": folder.name, "dir": str(folder), "resume": "auto"},
        "trackio": {"name": folder.name, "resume": "allow" if resume else "never"},
    }
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    settings["data"] = ", ".join(config.sources)  # TensorBoard takes no tuple
    # TensorBoard is given a folder and takes the name as one in it; the others know projects that hold runs.
    project = "tensorboard" if config.report_to == "tensorboard" else "vlm-lora"
    # trackio prints where results go; wandb would keep each line twice if that were redirected for it too.
    aside = redirect_stdout(sys.stderr) if config.report_to == "trackio" else nullcontext()
    try:
        with aside:
            accelerator.init_trackers(project, settings, {config.report_to: own.get(config.report_to, {})})
    except Exception as error:  # each tracker has classes of its own
        raise ConfigError(
            f"--report-to {config.report_to}: could not be started ({' '.join(str(error).split())}). Mend that and "
            "resume with --resume, or leave --report-to out."
        ) from error
    well = False
    try:
        yield
        well = True
    finally:
        with aside:
            if config.report_to == "wandb":  # else the next run in this Python program would be logged as this one
                cast(Any, accelerator.get_tracker("wandb", unwrap=True)).finish(exit_code=0 if well else 1)
            elif well:
                accelerator.trackers[0].finish()  # and not end_training, which would also part the processes
