"""Runs of several processes in tests: forked from one that has imported everything, which takes each ten seconds.

``python -m tests.forks`` reads a job a line from stdin and answers a line on stdout. There is no launcher, so nothing
ends the other processes when one has ended: they must do it themselves.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

LIMIT = 300.0  # seconds that a run may take before it counts as hanging; machines may be busy


def fewer_rows(module: str, reader: str) -> str:
    """Sabotage: a process whose ``reader`` gives it one example less for each process before it."""
    return f"""
import dataclasses, os, {module} as module
real = module.{reader}
def read(*given, **options):
    dataset = real(*given, **options)
    return dataclasses.replace(dataset, examples=dataset.examples[int(os.environ["RANK"]):])
module.{reader} = read
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or the signal's negative number, and what it said.

    ``late`` is the number of seconds that it ended behind the first of the run.
    """

    code: int
    out: str
    err: str
    late: float


class Forks:
    """The process that forks; `run` gives what became of each process of a run.

    Args:
        env: what libraries read while they are imported, beside this process's own environment.
    """

    def __init__(self, env: dict | None = None):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # On the CPU, also where there is a GPU: it would be one for several processes.
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {}),
        )  # fmt: skip

    def run(
        self, count: int, *arguments, env: dict | None = None, at: tuple | None = None, sabotage: str = "", cwd="."
    ):
        """``vlm-lora`` with these arguments in ``count`` processes.

        Args:
            at: (process, step, signal): the process sends itself the signal behind the step.
            sabotage: Python run in each process beforehand.
            cwd: the folder they run in.
        """
        job = {"count": count, "arguments": [str(a) for a in arguments], "at": at, "sabotage": sabotage}
        job["cwd"] = str(cwd)
        job["env"] = {"VLM_LORA_CACHE": os.environ["VLM_LORA_CACHE"]} | (env or {})
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return [Ended(*ended) for ended in json.loads(self.server.stdout.readline())]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


def serve() -> None:
    import transformers

    import vlm_lora.inference.report
    import vlm_lora.training.run  # noqa: F401
    from vlm_lora.model.folder import tiny_path

    transformers.AutoProcessor.from_pretrained(tiny_path())
    _ = transformers.Qwen2VLForConditionalGeneration
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(_run(job, Path(folder))), flush=True)


def _run(job: dict, folder: Path) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    running = {_fork(job, index, port, folder): index for index in range(job["count"])}
    codes, ends = {}, {}
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            index = running.pop(pid)
            codes[index], ends[index] = os.waitstatus_to_exitcode(status), time.monotonic()
        elif time.monotonic() - started > LIMIT:
            for hanging in running:
                os.kill(hanging, signal.SIGKILL)
            started = float("inf")
        else:
            time.sleep(0.02)
    said = [[_read(folder / f"{i}.{name}") for name in ("out", "err")] for i in range(job["count"])]
    return [[codes[i], *said[i], ends[i] - min(ends.values())] for i in range(job["count"])]


def _read(path: Path) -> str:
    """Without what Gloo of torch 2.9 says on standard output: to whom it is connected."""
    return re.sub(r"^\[Gloo\] .*\n", "", path.read_text(), flags=re.MULTILINE)


def _fork(job: dict, index: int, port: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{index}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ |= job["env"]
        os.chdir(job["cwd"])
        if job["count"] > 1:
            places = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": job["count"], "LOCAL_WORLD_SIZE": job["count"]}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in places.items()}
        from vlm_lora.cli import main
        from vlm_lora.progress import TrainReport

        report = TrainReport.step

        def step(self, *, step, **values):
            report(self, step=step, **values)
            if job["at"] and job["at"][:2] == [index, step]:
                os.kill(os.getpid(), job["at"][2])

        TrainReport.step = step
        exec(job["sabotage"], {})
        code = main(job["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
