"""ms-swift on the same work: `python swift_cli.py JOB.json BIN`, BIN being its environment's bin folder.

Its data has its own form, its order is the rows' order, and its own schedule stands in for the job's learning rates.
It takes the image placeholder's id to be that of the published checkpoints, and where it is another one it trains
without the image's tokens, faster, and says nothing; `swift_plugin.py` gives it the id and counts the tokens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from meter import read_job, read_rows


def main() -> None:
    job = read_job()
    output = Path(job["output"])
    output.mkdir(parents=True)
    with (output / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in read_rows(job):
            messages = [
                {"role": "user", "content": "<image>" + row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            file.write(json.dumps({"messages": messages, "images": [row["image"]]}) + "\n")
    settings = {
        "model": job["model"],
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "external_plugins": Path(__file__).with_name("swift_plugin.py"),
        "use_hf": "true",
        "attn_impl": "sdpa",
        "torch_dtype": "float32",
        "tuner_type": "lora",
        "lora_rank": job["rank"],
        "lora_alpha": int(job["alpha"]),
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "freeze_vit": "true",
        "freeze_aligner": "false",
        "gradient_checkpointing": "false",
        "vit_gradient_checkpointing": "false",
        "dataset": output / "rows.jsonl",
        "split_dataset_ratio": 0,
        "strict": "true",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_length": 4096,
        "output_dir": output / "out",
        "add_version": "false",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": "false",
        "fp16": "false",
        "use_cpu": "true",
        "seed": job["seed"],
    }
    command = [Path(sys.argv[2]) / "swift", "sft"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    memory = output / "memory.json"
    environment = os.environ | {
        "MAX_PIXELS": str(1024 * 28 * 28), "IMAGE_TOKENS": str(job["image_tokens"]), "MEMORY": str(memory),
    }  # fmt: skip
    if code := subprocess.run(command, env=environment).returncode:
        sys.exit(code)
    (log,) = (output / "out").rglob("logging.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    result = {
        "prepare": 0.0,
        "steps": [next(line["train_runtime"] for line in lines if "train_runtime" in line)],
        "losses": [line["loss"] for line in lines if "loss" in line],
        **json.loads(memory.read_text(encoding="utf-8")),
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
