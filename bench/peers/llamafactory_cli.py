"""LLaMA-Factory on the same work: `python llamafactory_cli.py JOB.json BIN`, BIN being its environment's bin folder.

Its data has its own form, its order is the rows' order, and its own schedule stands in for the job's learning rates.
It has no way to adapt the projector by LoRA without the tower: two of the linears that the others train are left out.
"""

import json
import subprocess
import sys
from pathlib import Path

from meter import read_job, read_rows


def main() -> None:
    job = read_job()
    output = Path(job["output"])
    output.mkdir(parents=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>" + row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [row["image"]],
        }
        for row in read_rows(job)
    ]
    (output / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (output / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    settings = {
        "model_name_or_path": job["model"],
        "template": "qwen2_vl",
        "trust_remote_code": False,
        "flash_attn": "sdpa",
        "image_max_pixels": 1024 * 28 * 28,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": job["rank"],
        "lora_alpha": job["alpha"],
        "lora_dropout": 0.0,
        "lora_target": "all",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "disable_gradient_checkpointing": True,
        "dataset": "rows",
        "dataset_dir": str(output),
        "disable_shuffling": True,
        "cutoff_len": 4096,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(output / "out"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "seed": job["seed"],
    }
    (output / "train.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")  # JSON is YAML
    command = [Path(sys.argv[2]) / "llamafactory-cli", "train", output / "train.yaml"]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    told = json.loads((output / "out" / "all_results.json").read_text())
    state = json.loads((output / "out" / "trainer_state.json").read_text())
    result = {
        "prepare": 0.0,
        "steps": [told["train_runtime"]],
        "losses": [line["loss"] for line in state["log_history"] if "loss" in line],
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
