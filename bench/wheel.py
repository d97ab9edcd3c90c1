"""What wheel and source archive hold, and whether the wheel works away from this clone.

python -m bench.wheel dist

Lists what each holds by folder, and fails where something is missing or too much. Then unpacks the wheel into a
throw-away environment that sees this one's packages and not the clone, and has it train: `vlm-lora doctor`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections import Counter
from pathlib import Path

WHEEL = ("vlm_lora/cli/doctor.py", "vlm_lora/py.typed", "vlm_lora/tiny/model.safetensors", "vlm_lora/tiny/config.json")
SOURCE = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "data/tiny/model/model.safetensors",
    "docs/index.md",
    "recipes/small.yaml",
)
NEVER = (".venv", "__pycache__", ".ci/", "runs/", ".git/")
MOST_BYTES = {"wheel": 12_000_000, "source": 40_000_000}


def check(what: str, path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
    missing = [name for name in wanted if name not in names]
    unwanted = [name for name in names if any(part in f"/{name}" for part in NEVER)]
    by_folder = Counter(name.rpartition("/")[0].split("/")[0] or "." for name in names)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(names)} files: {dict(by_folder.most_common())}")
    if missing or unwanted or path.stat().st_size > MOST_BYTES[what]:
        sys.exit(f"{path.name}: missing {missing}, unwanted {unwanted[:5]}, or larger than {MOST_BYTES[what]:,} bytes")


def try_out(wheel: Path) -> None:
    """The wheel in an environment of its own, with this one's packages on its path."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place) / "bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        own = Path(
            subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
        )
        (own / "zz_packages.pth").write_text("\n".join(packages) + "\n")  # after the wheel's own
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["VLM_LORA_CACHE"] = f"{place}/cache"
        told = {"cwd": place, "env": environment, "check": True}
        where = subprocess.run(
            [python, "-c", "import vlm_lora; print(vlm_lora.__file__)"], stdout=subprocess.PIPE, text=True, **told
        )
        assert where.stdout.startswith(place), where.stdout
        subprocess.run([Path(place) / "bin/vlm-lora", "doctor"], **told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    (wheel,), (source,) = options.folder.glob("*.whl"), options.folder.glob("*.tar.gz")
    check("wheel", wheel, zipfile.ZipFile(wheel).namelist(), WHEEL)
    with tarfile.open(source) as tar:
        check("source", source, [name.partition("/")[2] for name in tar.getnames()], SOURCE)
    try_out(wheel.resolve())


if __name__ == "__main__":
    main()
