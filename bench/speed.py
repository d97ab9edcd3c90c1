"""Training speed and memory beside other tools: the same work, by turns, on one core of one machine.

    python -m bench.speed                         the main table: a plain loop, ms-swift, vlm-lora (about 45 minutes)
    python -m bench.speed peers                   TRL, LLaMA-Factory and ms-swift, at one workload
    python -m bench.speed techniques growth       each technique by itself; cost over tokens and data size
    python -m bench.speed --table                 the record as Markdown
    python -m bench.speed --plots                 and as drawings

All tools load the same checkpoint of random weights (`bench.work`) and train LoRA of the same rank with the same
optimizer, learning rates, batch and precision (float32). Each run is a process of its own, pinned to one core with
one thread; the tools take turns, and medians are compared. Other tools run in environments of their own, made at the
first use from bench/peers/*.txt. The losses of the plain loop, TRL and vlm-lora, on the same answers in the same order,
must agree step by step, or the bench stops. LLaMA-Factory and ms-swift bring schedules of their own, and ms-swift
learns the line break behind each answer too: the same amount of work, other losses.

"An epoch" is the time of an epoch's steps; for vlm-lora, from a full cache. "Whole training" is three epochs and all
that stands before them once the model is loaded: reading, tokens, filling the cache. An epoch of the other tools is
always the same work, so theirs is one measured epoch times three. Memory is the peak while training over what the
loaded model takes; of LLaMA-Factory, which doesn't tell, only that of the whole process is known.
The record goes to bench/results/speed.json, where a suite's runs take the place of its earlier ones; the last line of
output is JSON: the summary of the main suite, and the medians of those that were run.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
RECORD = ROOT / "bench" / "results" / "speed.json"
EPOCHS = 3
SETTINGS = {"batch_size": 10, "rank": 8, "lr": 1e-3, "seed": 0}
OURS = "vlm-lora"  # by itself: an epoch from a full cache; "vlm-lora, cold": three from an empty one
COLD = "vlm-lora, cold"
TECHNIQUES = {
    "vlm-lora, none": "",
    "vlm-lora, labels": "labels",
    "vlm-lora, cache": "cache",
    "vlm-lora, share": "share",
    OURS: "labels cache share",
}
SUITES = {
    # methods, [(what is said of an image, image tokens, answers an epoch)]
    "main": (
        ["plain", "swift", COLD, OURS],
        [("1 caption", 256, 40), ("5 captions", 256, 40), ("10 questions", 256, 40)],
    ),
    "peers": (["plain", "trl", "llamafactory", "swift"], [("5 captions", 256, 20)]),
    "techniques": (["plain", COLD, *TECHNIQUES], [("5 captions", 256, 20)]),
    "growth": (
        ["plain", COLD],
        [("5 captions", 16, 20), ("5 captions", 64, 20), ("5 captions", 64, 40), ("5 captions", 64, 80)],
    ),
}
TARGETS = {
    # workload: at least so many times the best peer's epoch, whole training; at most so much of its peak memory
    "1 caption, 256 tokens": (2.1, 1.6, 0.7),
    "5 captions, 256 tokens": (9.0, 7.0, 0.4),
    "10 questions, 256 tokens": (13.5, 11.0, 0.4),
}


# ---- one run -----------------------------------------------------------------------------------------------------


def train_here(job: dict) -> None:
    """vlm-lora in this process, with the techniques the job names; the result goes to the job's file."""
    sys.path.insert(0, str(PEERS))
    from meter import Meter, read_weights

    from vlm_lora import TrainConfig
    from vlm_lora.model.adapters.methods import attach_adapter
    from vlm_lora.training.events import Events
    from vlm_lora.training.run import train_adapter
    from vlm_lora.training.techniques import Techniques

    def attach(backbone, config):
        read_weights(backbone.model)
        return attach_adapter(backbone, config)

    with_these = job["techniques"].split()
    techniques = Techniques(
        shared_prefix="share" in with_these,
        label_logits="labels" in with_these,
        features_in_memory="cache" in with_these,  # on disk the config keeps nothing then either
        attach=attach,
    )
    meter = Meter(job)

    class Metered(Events):
        def parts(self, adapter, model):
            meter.begin()

        def start(self, **values):
            meter.steps_begin()

        def step(self, *, loss, **values):
            meter.step(loss)

    train_adapter(
        TrainConfig(
            data=job["data"], model=job["model"], output=job["output"], epochs=job["epochs"], val_split=0.0,
            save_every=10**6, dtype=job["dtype"], cache="cache" in job["techniques"], **SETTINGS,
        ),
        events=Metered(),
        techniques=techniques,
    )  # fmt: skip
    meter.end()


def python_of(method: str, environments: Path) -> Path:
    """The Python of a tool's own environment, which is made here if there is none yet."""
    folder = environments / method
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"Making an environment for {method} in {folder} (minutes, about 6 GB) ...", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "-r", PEERS / f"{method}.txt"]
        subprocess.run(install, check=True)
        (folder / "complete").touch()
    return python


def run_once(method: str, job: dict, environments: Path) -> dict:
    """One run in a process of its own. What the process does not tell of itself is seen from outside."""
    folder = Path(job["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = job | {"result": str(folder / "result.json"), "output": str(folder / "run"), "spawned": time.time()}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "VLM_LORA_CACHE": job["cache"],
    }  # fmt: skip
    if method.startswith(OURS):
        command = [sys.executable, "-m", "bench.speed", "--job", folder / "job.json"]
    elif method == "plain":
        command = [sys.executable, PEERS / "plain.py", folder / "job.json"]
    elif method == "trl":
        command = [python_of("trl", environments), PEERS / "trl_sft.py", folder / "job.json"]
    else:
        command = [sys.executable, PEERS / f"{method}_cli.py", folder / "job.json"]
        command.append(python_of(method, environments).parent)
    with (folder / "log.txt").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, use = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    if status:
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
        raise SystemExit(f"{method} failed; the end of {folder / 'log.txt'}:\n" + "\n".join(lines[-15:]))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    outside = {
        "wall": round(wall, 2),
        "process_cpu": round(use.ru_utime + use.ru_stime, 2),
        "process_peak_bytes": use.ru_maxrss * 1024,
    }
    return {"startup": round(wall - sum_of(result), 2)} | result | outside


def sum_of(result: dict) -> float:
    return result["prepare"] + result["steps"][-1]


# ---- many runs ---------------------------------------------------------------------------------------------------


def prepare(work: Path, shape: str, dtype: str, said: str, tokens: int, answers: int, epochs: int = 1) -> dict:
    """Checkpoint, data, and what all runs of one workload have in common."""
    from bench.work import write_checkpoint, write_data
    from vlm_lora import read_dataset
    from vlm_lora.config import DEFAULT_PROMPT
    from vlm_lora.training.schedule import Schedule

    model = work / shape
    if not model.exists():
        write_checkpoint(model, shape)
    data = work / f"{said.replace(' ', '-')}-{tokens}-{answers}"
    shutil.rmtree(data, ignore_errors=True)
    count = int(said.split()[0])
    if answers % count:
        raise SystemExit(f"--answers {answers}: expected a multiple of {count}, for {said} of each image")
    table = write_data(data, images=answers // count, said=said, tokens=tokens)
    examples = read_dataset(table, prompt=DEFAULT_PROMPT).examples
    schedule = Schedule(
        [count] * len(examples), batch_size=SETTINGS["batch_size"], epochs=epochs, seed=SETTINGS["seed"]
    )
    return {
        "model": str(model),
        "dtype": dtype,
        "data": str(table),
        "techniques": TECHNIQUES[OURS],
        "epochs": epochs,
        "image_tokens": tokens,
        "cache": str(data / "cache"),
        **peer_job(data / "rows.jsonl", examples, schedule, schedule.num_steps, SETTINGS),
    }


def peer_job(path: Path, examples, schedule, steps: int, settings: dict) -> dict:
    """What another tool needs to learn the schedule's first ``steps`` steps in their order, with these ``settings``:
    batch_size, rank, lr, seed. ``path`` gets an answer a line."""
    from vlm_lora.model.families import FAMILIES
    from vlm_lora.training.step import learning_rate

    rows, linears = [], FAMILIES["qwen2_vl"].linears
    for step in range(steps):
        for example, dialogues in schedule.step(step):
            for dialogue in dialogues:
                (turn,) = examples[example].dialogues[dialogue].turns
                image = str(examples[example].images[0].path)
                rows.append({"image": image, "question": turn.user, "answer": turn.assistant})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return settings | {
        "rows": str(path),
        "targets": f"(?:.*\\.)?(?:{linears['language']}|{linears['projector']})",
        "alpha": 2 * settings["rank"],
        # The other tools that allow it are given these very rates.
        "rates": [learning_rate(s, schedule.num_steps, settings["lr"], 0.05) for s in range(schedule.num_steps)],
    }


def job_of(method: str, common: dict, folder: Path) -> dict:
    job = common | {"folder": str(folder)}
    if method == COLD:
        shutil.rmtree(job["cache"], ignore_errors=True)
        return job | {"epochs": EPOCHS}
    techniques = TECHNIQUES.get(method, "")
    if "cache" in techniques and not Path(job["cache"]).exists():
        raise SystemExit(f"{method} is measured from a full cache; let {COLD!r} run before it, which fills one")
    return job | {"techniques": techniques}


def predicted(job: dict) -> dict[str, float]:
    """How many times the plain loop's operations are ours, by the cost model of `vlm-lora plan`."""
    from dataclasses import replace

    import torch

    from vlm_lora import TrainConfig, read_dataset
    from vlm_lora.model.encode import Encoder
    from vlm_lora.model.preprocess import load_preprocessor
    from vlm_lora.training.cost import CostModel, micro_shapes
    from vlm_lora.training.lessons import Lesson
    from vlm_lora.training.schedule import Schedule

    base = load_preprocessor(job["model"])
    side = 2 * round(job["image_tokens"] ** 0.5)
    encoder, grid = Encoder(base), torch.tensor([[1, side, side]])
    config = TrainConfig(data=job["data"], model=job["model"], **SETTINGS).on("cpu")
    cost = CostModel(config, torch.float32, "cpu")
    tower = cost.tower_operations(side * side)
    examples = read_dataset(job["data"], prompt=config.prompt).examples
    alone = [replace(e, dialogues=(dialogue,)) for e in examples for dialogue in e.dialogues]

    def steps(examples, micro_batch_tokens):
        """The micro-batches of an epoch."""
        lessons = [Lesson.of(e, encoder.sizes(e.dialogues, grid)) for e in examples]
        patches = {image: side * side for e in examples for image in e.images}
        schedule = Schedule.of(config.replace(epochs=1.0), [len(e.dialogues) for e in examples])
        shapes = []
        for step in range(schedule.num_steps):
            chosen = [lessons[i].with_branches(dialogues) for i, dialogues in schedule.step(step)]
            (own,) = micro_shapes(chosen, patches, micro_batch_tokens)
            shapes += own
        return shapes

    # Plain: the tower in each step, and logits of every token.
    apart = steps(alone, 10**9)
    first = apart[0]._replace(labels=0)
    head = cost.step_operations(first._replace(labels=1)) - cost.step_operations(first)
    plain = sum(cost.step_operations(s._replace(labels=0)) + s.rows * (tower + s.width * head) for s in apart)
    ours = sum(map(cost.step_operations, steps(examples, config.micro_batch_tokens)))
    whole = EPOCHS * ours + len(examples) * tower
    return {"epoch": round(plain / ours, 3), "whole": round(EPOCHS * plain / whole, 3)}


def parity(runs: dict[str, dict], wanted: float) -> float:
    """The largest difference between the methods' losses in any step; `SystemExit` where it is above ``wanted``."""
    if not runs:
        return 0.0
    losses = {name: run["losses"] for name, run in runs.items() if run["losses"]}
    shortest = min(map(len, losses.values()))
    worst = max(max(step) - min(step) for step in zip(*(each[:shortest] for each in losses.values()), strict=True))
    if worst > wanted:
        raise SystemExit(f"Losses of what should be the same work differ by {worst:.4f}: {json.dumps(losses)}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("suites", nargs="*", help=f"what to run, of {', '.join(SUITES)}; by default main")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="only these of the suite's")
    parser.add_argument("--answers", type=int, help="answers an epoch, instead of the suite's number")
    parser.add_argument("--shape", default="small", choices=("small", "smoke"), help="smoke tries the bench itself")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the CPU core to run on")
    parser.add_argument("--environments", type=Path, default=ROOT / "runs" / "peers", help="folder of the tools' own")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speed", help="folder of checkpoint, data, logs")
    parser.add_argument("--record", type=Path, help="by default bench/results/speed.json, with smoke in --work")
    parser.add_argument("--setup", action="store_true", help="only make the environments")
    parser.add_argument("--table", action="store_true", help="only print the record as Markdown")
    parser.add_argument("--plots", action="store_true", help="only draw the record, as SVG beside it")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # one run of vlm-lora, in this process
    args = parser.parse_args()
    args.record = args.record or (RECORD if args.shape == "small" else args.work / "smoke.json")
    if args.job:
        train_here(json.loads(args.job.read_text(encoding="utf-8")))
        return
    if args.setup:
        for method in ("trl", "llamafactory", "swift"):
            python_of(method, args.environments)
        return
    if args.table or args.plots:
        from bench.speed_report import plots, table

        record = json.loads(args.record.read_text(encoding="utf-8"))
        if args.table:
            print(table(record))
        if args.plots:
            print(*plots(record, args.record.parent), sep="\n")
        return
    for name in args.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    os.sched_setaffinity(0, {args.core})
    record = read_record(args)
    for name in args.suites or ["main"]:
        run_suite(name, args, record)
    from bench.speed_report import medians, summary, table

    record["summary"] = summary(record)
    write_record(args.record, record)
    print(table(record))
    run = {name: medians(record, name) for name in args.suites or ["main"]}
    print(json.dumps({"summary": record["summary"], "medians": run}))


def read_record(args: argparse.Namespace) -> dict:
    """The record so far if it was made by the same versions on the same kind of machine, else a new one."""
    import torch
    import transformers

    from vlm_lora import __version__

    head = {
        "machine": f"{cpu_name()}, 1 core, 1 thread",
        "versions": {
            "vlm-lora": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": SETTINGS | {"shape": args.shape, "dtype": args.dtype},
    }  # fmt: skip
    if args.record.exists():
        old = json.loads(args.record.read_text(encoding="utf-8"))
        if {key: old[key] for key in head} == head:
            return old
    return head | {"peers": {}, "parity": {}, "predicted": {}, "runs": []}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def run_suite(suite: str, args: argparse.Namespace, record: dict) -> None:
    record["runs"] = [run for run in record["runs"] if run["suite"] != suite]
    methods, workloads = SUITES[suite]
    methods = [method for method in methods if not args.methods or method in args.methods]
    if args.shape == "smoke":
        workloads = [(said, 16, 20) for said in dict.fromkeys(said for said, _, _ in workloads)]
    if args.dtype != "float32":  # their switches for it mean something else: autocast over float32
        methods = [method for method in methods if method not in ("llamafactory", "swift")]
    for method in set(methods) & {"trl", "llamafactory", "swift"}:
        python_of(method, args.environments)  # before anything is timed
        record["peers"][method] = (PEERS / f"{method}.txt").read_text().split("\n")[:-1]
    for said, tokens, answers in workloads:
        answers = args.answers or answers
        common = prepare(args.work, args.shape, args.dtype, said, tokens, answers)
        workload = f"{said}, {tokens} tokens"
        if suite == "main":
            record["predicted"][f"{workload}, {answers} answers"] = predicted(common)
        for repeat in range(args.repeat):
            runs = {}
            for method in methods:
                folder = args.work / "runs" / f"{workload}-{method}".replace(", ", "-").replace(" ", "-")
                run = run_once(method, job_of(method, common, folder), args.environments)
                runs[method] = run
                record["runs"].append(
                    {"suite": suite, "workload": workload, "answers": answers, "method": method,
                     "repeat": repeat, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                     "load": round(os.getloadavg()[0], 2), **run}
                )  # fmt: skip
                write_record(args.record, record)
                print(
                    f"{workload}, {repeat + 1}/{args.repeat}, {method}: {run['steps'][-1]:.1f} s of steps, "
                    f"{run['prepare']:.1f} s before, start-up {run['startup']:.1f} s",
                    file=sys.stderr,
                )
            same = {name: run for name, run in runs.items() if name not in ("llamafactory", "swift", COLD)}
            record["parity"][workload] = parity(same, 2e-3 if args.dtype == "float32" else 5e-2)


if __name__ == "__main__":
    main()
