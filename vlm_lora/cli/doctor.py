"""Say what vlm-lora finds on this machine, and try it: versions, device, cache, and a short training run.

Paste its output into a bug report. It names no files of yours but the cache folder.

  vlm-lora doctor
  vlm-lora doctor --no-test      without the training run, which takes 15 seconds or more

Exit code 0: everything that was tried works; 1: something does not, and the last lines say what.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from vlm_lora import __version__
from vlm_lora.config import CACHE_VARIABLE, TrainConfig, cache_folder
from vlm_lora.console import one_line, size
from vlm_lora.errors import VlmLoraError

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "gradio", "pillow", "safetensors")
OPTIONAL = {
    "flash-linear-attention": 'linear attention of Qwen3.5 on a GPU; pip install "vlm-lora[gpu]"',
    "bitsandbytes": '--method qlora; pip install "vlm-lora[qlora]"',
}
VARIABLES = (CACHE_VARIABLE, "VLM_LORA_MAX_MEGAPIXELS", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50),
    "black": (20, 20, 20), "white": (240, 240, 240), "grey": (128, 128, 128), "pink": (250, 150, 190),
}  # fmt: skip
"""What the training run learns to name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-test", action="store_true", help="leave out the training run")


def run(options: argparse.Namespace) -> int:
    faults: list[str] = []
    for line in (*_software(faults), *_device(faults), *_cache(faults)):
        print(one_line(line), flush=True)
    if not options.no_test:
        print(one_line(_trained(faults)))
    for fault in faults:
        print(one_line(f"problem:    {fault}"))
    print(f"Problems: {len(faults)}." if faults else "No problem found.")
    return 1 if faults else 0


def _software(faults: list[str]) -> Iterator[str]:
    yield f"vlm-lora:   {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    yield "packages:   " + ", ".join(f"{name} {found[name] or 'missing'}" for name in PACKAGES)
    for name, use in OPTIONAL.items():
        yield f"optional:   {name} {found[name] or 'not installed'} ({use})"
    faults += _outside_of_range(found)
    for name in VARIABLES:
        if name in os.environ:
            yield f"variable:   {name}={os.environ[name]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _outside_of_range(found: dict[str, str | None]) -> list[str]:
    """Packages whose release is not one that vlm-lora says it works with."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("vlm-lora") or ()]
    except PackageNotFoundError:
        return [
            "vlm-lora itself is not installed (pip install vlm-lora): the releases of its packages are not checked."
        ]
    return [
        f"{each.name} is {found[each.name] or 'missing'}; expected {each.specifier}: pip install '{each}'"
        for each in wanted
        if each.name in PACKAGES and not each.specifier.contains(found[each.name] or "0", prereleases=True)
    ]


def _device(faults: list[str]) -> Iterator[str]:
    import torch

    from vlm_lora.model.device import best_device, resolve_dtype
    from vlm_lora.model.kernels import require_sound

    device = best_device()
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield f"device:     {device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads ({built})"
        yield f"dtype:      {dtype} by --dtype auto"
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield f"device:     cuda:{index} {about.name}, {size(about.total_memory)}, compute {about.major}.{about.minor}"
    yield f"dtype:      {dtype} by --dtype auto; CUDA {torch.version.cuda}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            require_sound("Qwen3.5", device)
        except VlmLoraError as error:
            faults.append(str(error))
    yield from (f"note:       {warning.message}" for warning in told)


def _cache(faults: list[str]) -> Iterator[str]:
    from vlm_lora.model.features import store_in

    folder = cache_folder()
    use = store_in(folder).use()
    yield f"cache:      {folder}: features of {use.entries:,} images, {size(use.num_bytes)}"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    yield f"            {size(shutil.disk_usage(there).free)} are free on its disk"
    if not os.access(there, os.W_OK):
        faults.append(f"{there}: cannot be written. Set {CACHE_VARIABLE} to a folder that can.")


def _trained(faults: list[str]) -> str:
    """Trains the embedded model to name colours, saves, loads, and asks it: what a run does, in small."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlm-lora-doctor-", ignore_cleanup_errors=True) as place:
        try:
            right = _names_colours(Path(place))
        except Exception as error:  # whatever it is, it is what was looked for
            if os.environ.get("VLM_LORA_TRACEBACK"):
                raise
            faults.append(f"the test run failed: {type(error).__name__}: {error} (VLM_LORA_TRACEBACK=1 shows where)")
            return "test:       failed"
    if right < len(COLOURS):
        faults.append(f"after training the model names {right} of {len(COLOURS)} colours, expected all.")
    told = f"trained, saved, loaded; {right} of {len(COLOURS)} colours named"
    return f"test:       {told} in {time.monotonic() - began:.0f} seconds"


def _names_colours(place: Path) -> int:
    """How many colours the model names right that was trained, saved and loaded in the folder ``place``."""
    from PIL import Image

    from vlm_lora.inference.captioner import Captioner
    from vlm_lora.run import train
    from vlm_lora.training.events import Events

    data = place / "colours"
    data.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(name)
    settings = {"val_split": 0.0, "cache": False, "batch_size": len(COLOURS), "epochs": 25.0, "lr": 5e-3}
    config = TrainConfig(data=str(data), model="tiny", prompt="Which colour?", output=str(place / "run"), **settings)
    train(config, events=Events(), eval_images=0)
    captioner = Captioner.load(adapter=str(place / "run"))
    return sum(answer.text == Path(str(answer.image)).stem for answer in captioner.caption(sorted(data.glob("*.png"))))
