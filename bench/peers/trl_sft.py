"""TRL's SFTTrainer on the same work: `python trl_sft.py JOB.json`, in TRL's own environment.

Model, LoRA and optimizer are made as in the plain loop, so that the losses can be compared step by step.
"""

from datasets import Dataset, Image, List
from meter import Meter, read_job, read_rows
from plain import load
from transformers import AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Told(TrainerCallback):
    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, *args, **kwargs):
        self.meter.begin()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # behind every step; the last log of a run is another one
            self.meter.step(logs["loss"])


def main() -> None:
    job = read_job()
    meter = Meter(job)
    rows = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}],
        }
        for row in read_rows(job)
    ]
    model, _, optimizer, schedule = load(job)
    settings = SFTConfig(
        output_dir=job["output"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        learning_rate=job["lr"],
        max_grad_norm=1.0,
        weight_decay=0.0,
        seed=job["seed"],
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        processing_class=AutoProcessor.from_pretrained(job["model"]),
        optimizers=(optimizer, schedule),
        callbacks=[Told(meter)],
    )
    trainer.train()
    meter.end()


if __name__ == "__main__":
    main()
