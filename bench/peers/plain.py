"""A careful plain loop over transformers and PEFT, as a good engineer writes one: `python plain.py JOB.json`.

One padded row an answer; pictures are opened and go through the processor and the frozen tower in each step.
"""

import torch
from meter import Meter, read_job, read_rows, read_weights
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration


def collate(processor, rows: list[dict]) -> dict[str, torch.Tensor]:
    texts, images, answers = [], [], []
    for row in rows:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]
        texts.append(processor.apply_chat_template(messages, tokenize=False))
        with Image.open(row["image"]) as image:
            images.append(image.convert("RGB"))
        answers.append(len(processor.tokenizer(row["answer"] + "<|im_end|>")["input_ids"]))
    batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for i, (end, count) in enumerate(zip(batch["attention_mask"].sum(1).tolist(), answers, strict=True)):
        labels[i, end - count : end] = batch["input_ids"][i, end - count : end]
    return {**batch, "labels": labels}


def load(job: dict):
    """Model with fresh LoRA, and its optimizer with the job's learning rates."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    read_weights(model)
    torch.manual_seed(job["seed"])
    lora = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=job["targets"])
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = job["rates"]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)] / job["lr"])
    return model, trained, optimizer, schedule


def main() -> None:
    job = read_job()
    rows, meter = read_rows(job), Meter(job)
    processor = AutoProcessor.from_pretrained(job["model"])
    model, trained, optimizer, schedule = load(job)
    model.train()
    meter.begin()
    for start in range(0, len(rows), job["batch_size"]):
        batch = collate(processor, rows[start : start + job["batch_size"]])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(loss.item())
    meter.end()


if __name__ == "__main__":
    main()
