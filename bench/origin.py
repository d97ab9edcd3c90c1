"""What a record says of where it comes from."""

import platform
import shlex
import sys
import time

import torch

from vlm_lora import __version__


def origin(bench: str, machine: str) -> dict:
    """The command of this run, the day, the machine in the words given, and the versions."""
    return {
        "command": shlex.join(["python", "-m", f"bench.{bench}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": {"vlm-lora": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
