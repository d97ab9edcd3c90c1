"""The tests of what we rely on in transformers, with the oldest release that is supported and with the newest.

    python -m bench.upstream [--versions "5.19.*" "5.*,<5.40"]

Each release goes into an environment of its own under runs/upstream, which shares all other packages with this one.
The record goes to bench/results/upstream.json; the last line is JSON. Exits with 1 where a test failed.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from bench.origin import origin

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/model/test_upstream.py",
    "tests/model/test_exactness.py",
    "tests/model/test_encode.py",
    "tests/model/test_methods.py",
    "tests/inference/test_captioner.py",
    "tests/training/test_train.py",
]


def python_with(version: str, folder: Path) -> Path:
    """The Python of an environment like this one, but with this release of transformers."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
    return python


def outcome(python: Path) -> dict:
    """The release that is tested, and how many tests ended how."""
    command = [python, "-c", "import transformers; print(transformers.__version__)"]
    release = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    done = subprocess.run([python, "-m", "pytest", *TESTS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", done.stdout.splitlines()[-1])
    return {"transformers": release, **{word: int(number) for number, word in counts}, "exit": done.returncode}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--versions", nargs="+", default=["5.19.*", "5.*,<5.40"], help="of transformers, for pip")
    parser.add_argument("--environments", type=Path, default=ROOT / "runs" / "upstream", help="folder of environments")
    parser.add_argument("--record", type=Path, default=ROOT / "bench/results/upstream.json")
    args = parser.parse_args()
    runs = [outcome(python_with(version, args.environments / str(i))) for i, version in enumerate(args.versions)]
    record = {
        **origin("upstream", platform.machine()),
        "tests": TESTS,
        "runs": runs,
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs))
    return int(any(run["exit"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
