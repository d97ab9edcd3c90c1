"""Commands on several processes, as ``torchrun`` or ``accelerate launch`` start them."""

import argparse
import os

from vlm_lora.console import launched
from vlm_lora.errors import ConfigError
from vlm_lora.inference.team import ALONE, Team


def team_of(options: argparse.Namespace) -> Team:
    """The processes that share what `caption` or `eval` has to answer: usually this one alone.

    Raises:
        ConfigError: what is asked for cannot be shared.
    """
    if not launched():
        return ALONE
    if options.endpoint:
        raise ConfigError(
            "--endpoint: one process asks a server, --concurrency questions at a time. Leave the launcher out."
        )
    from vlm_lora.training.processes import Processes, require_possible  # here, as it brings torch

    if require_possible("lora", os.environ):
        raise ConfigError(
            "FSDP2 is for train: here each process holds the whole base, and answers a share. Leave it out."
        )
    return Processes("lora")
