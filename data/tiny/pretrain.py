"""Pretrain the embedded base model `tiny`: a Qwen2-VL of four million parameters that truly sees.

    npm pack emoji-datasource-google@16.0.0 && tar -xzf emoji-datasource-google-16.0.0.tgz
    python data/tiny/build_tokenizer.py OUT
    python data/tiny/pretrain.py OUT --emoji package [--threads N]

Three stages, all seeded, each kept in ``--work`` when it is done:

tower    The vision tower alone learns to name what every 8x8 patch shows: a dense lesson that teaches shape and kind
         far sooner than captions do.
joint    Tower, merger and language model together learn to caption scenes and answer questions about them, several
         conversations behind one image (`vlm_lora.model.packing`), with the patch lesson kept on beside.
answers  With the tower frozen, many more yes-or-no questions. Matching a word against a picture is learnt late and then
         suddenly; with one such question in three it had not come by the end of the joint stage.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import (
    CAPTION_REQUESTS,
    COLOURS,
    KINDS,
    ONE_WORD,
    PATCH,
    THINGS,
    YES_NO,
    caption,
    draw_scene,
    load_emoji,
    question,
)
from transformers import (
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision, get_vision_position_ids

from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, mrope_positions, pack

SIZES = [(64, 64), (64, 64), (64, 64), (64, 64), (96, 64), (64, 96), (80, 80), (96, 96)]  # pixels, width x height
HELD_OUT = 1_000_000_000  # scene numbers from here on are never trained on
BRANCHES = {"joint": (6, 0), "answers": (4, 6)}  # conversations an image: of all kinds, and yes or no


def build_model(tokenizer, seed: int) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": 4, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 4, "patch_size": PATCH, "hidden_size": 192,
            "initializer_range": 0.05,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "initializer_range": 0.05, "rms_norm_eps": 1e-6, "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        },
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def build_processor(tokenizer) -> Qwen2VLProcessor:
    size = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}  # pixels in all, as Qwen2-VL counts: 16 to 36 tokens
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(patch_size=PATCH, size=size),
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


class Tower:
    """The model's own tower on a batch of equally large pictures: its stock forward takes them one by one."""

    def __init__(self, visual, processor):
        self.visual, self.image_processor = visual, processor.image_processor
        self.mean = torch.tensor(self.image_processor.image_mean)[:, None, None]
        self.std = torch.tensor(self.image_processor.image_std)[:, None, None]

    def patches(self, pictures: np.ndarray) -> torch.Tensor:
        """``(B, H, W, 3)`` bytes to ``(B, patches, 3 * 2 * 8 * 8)``, in the processor's 2x2-block order."""
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std
        b, c, h, w = pixels.shape
        blocks = pixels.reshape(b, c, h // PATCH // 2, 2, PATCH, w // PATCH // 2, 2, PATCH)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(
            -1, -1, -1, -1, -1, -1, 2, -1, -1
        )
        return blocks.reshape(b, h // PATCH * (w // PATCH), -1)

    def __call__(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Features before the merger, ``(B, patches, width)``."""
        visual, (b, n, _) = self.visual, patches.shape
        x = visual.patch_embed(patches.reshape(b * n, -1)).view(b, n, -1)
        cos, sin = visual.rotary_pos_emb(x, get_vision_position_ids(torch.tensor([grid]), 2))
        for block in visual.blocks:
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).view(b, n, 3, heads, -1).unbind(2)
            q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
            attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + block.attn.proj(attended.transpose(1, 2).reshape(b, n, -1))
            x = x + block.mlp(block.norm2(x))
        return x

    @torch.no_grad()
    def check(self) -> None:
        """Fail unless this is the stock tower on the stock processor's patches."""
        pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
        stock = self.image_processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        ours = self.patches(pictures)
        torch.testing.assert_close(ours.reshape(-1, ours.shape[-1]), stock["pixel_values"], atol=1e-5, rtol=1e-5)
        expected = self.visual(stock["pixel_values"], stock["image_grid_thw"]).last_hidden_state
        got = self(ours, tuple(stock["image_grid_thw"][0].tolist()))
        torch.testing.assert_close(got.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)


def block_order(labels: np.ndarray) -> np.ndarray:
    """Patch labels ``(B, rows, columns)`` in the tower's 2x2-block order, ``(B, patches)``."""
    b, h, w = labels.shape
    return labels.reshape(b, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 2, 4).reshape(b, -1)


class Lessons:
    def __init__(self, tokenizer, config, emoji, seed: int):
        self.tokenizer, self.config, self.emoji, self.seed = tokenizer, config, emoji, seed
        self.heads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pieces: dict[str, list[int]] = {}

    def scenes(self, first: int, count: int, size) -> list:
        emoji_share = 0.45
        return [
            draw_scene(np.random.default_rng([self.seed, first + i]), self.emoji, size, emoji_share)
            for i in range(count)
        ]

    def tokens(self, text: str) -> list[int]:
        if text not in self.pieces:
            self.pieces[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.pieces[text]

    def prefix(self, grid) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = grid[1] * grid[2] // 4
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        ids = torch.tensor(self.tokens(system + "<|image_pad|>" * tokens + "<|vision_end|>"))
        return ids, mrope_positions(ids, torch.tensor([grid]), self.config.image_token_id, 2)

    def branch(self, request: str, answer: str) -> Branch:
        ask = self.tokens(f"{request}<|im_end|>\n<|im_start|>assistant\n")
        say = self.tokens(f"{answer}<|im_end|>")
        return Branch(torch.tensor(ask + say), torch.tensor([IGNORE_INDEX] * len(ask) + say))

    def encode(self, scene, number: int, grid, stage: str) -> Encoded:
        rng = np.random.default_rng([self.seed, number, 1])
        branches = [self.branch(str(rng.choice(CAPTION_REQUESTS)), caption(scene, rng))]
        mixed, yes_no = BRANCHES[stage]
        for kinds in [KINDS] * (mixed - 1) + [YES_NO] * yes_no:
            ask, sentence, word = question(scene, rng, kinds)
            short = rng.random() < 0.3
            branches.append(self.branch(ask + ONE_WORD, word) if short else self.branch(ask, sentence))
        return Encoded(*self.prefix(grid), tuple(branches))


def patch_loss(heads, features: torch.Tensor, scenes) -> tuple[torch.Tensor, float]:
    """Cross-entropy of each patch's thing and colour; and the share of thing patches named rightly."""
    names, colours = (
        torch.from_numpy(block_order(np.stack(x))) for x in zip(*(s.patch_labels() for s in scenes), strict=True)
    )
    by_name, by_colour = heads["name"](features), heads["colour"](features)
    weight = torch.where(names > 0, 1.0, 0.15)
    loss = F.cross_entropy(by_name.flatten(0, 1), names.flatten(), reduction="none") * weight.flatten()
    loss = loss + F.cross_entropy(by_colour.flatten(0, 1), colours.flatten(), reduction="none") * weight.flatten()
    right = (by_name.argmax(-1) == names)[names > 0].float().mean().item()
    return loss.sum() / weight.sum(), right


def language_loss(model, tower_features, encoded: list[Encoded]) -> torch.Tensor:
    batch = pack([[e] for e in encoded], model.config.text_config.pad_token_id)
    merged = model.model.visual.merger(tower_features.flatten(0, 1))
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=(merged,))},
        use_cache=False,
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    spoken = targets != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[:, :-1][spoken]), targets[spoken])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def optimizer_for(model, heads, stage: str) -> torch.optim.AdamW:
    """In the joint stage the tower, which has learnt already, goes on at a third of the rate; then it stands still."""
    visual = model.model.visual
    trained = [*heads.parameters(), *(visual if stage == "tower" else model).parameters()]
    if stage == "answers":
        still = {id(p) for part in (visual.patch_embed, visual.blocks, heads) for p in part.parameters()}
        trained = [p for p in trained if id(p) not in still]
    learnt = {id(p) for p in visual.blocks.parameters()} if stage == "joint" else set()
    groups = [
        {"params": members, "weight_decay": decay, "scale": scale}
        for scale, of_scale in (
            (1.0, [p for p in trained if id(p) not in learnt]),
            (0.3, [p for p in trained if id(p) in learnt]),
        )
        for decay, members in ((0.05, [p for p in of_scale if p.ndim > 1]), (0.0, [p for p in of_scale if p.ndim <= 1]))
        if members
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def train(args) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, args.seed).train()
    emoji = load_emoji(args.emoji)
    lessons = Lessons(tokenizer, model.config, emoji, args.seed)
    tower = Tower(model.model.visual, processor)
    tower.check()
    width = model.config.vision_config.embed_dim
    heads = torch.nn.ModuleDict(
        {"name": torch.nn.Linear(width, 1 + len(THINGS)), "colour": torch.nn.Linear(width, 1 + len(COLOURS))}
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    number, started = 0, time.time()
    # The joint stage's rate falls as if it went on for a fifth longer; the next stage goes on from there.
    stages = [
        ("tower", args.tower_steps, args.tower_steps, 64, 2e-3),
        ("joint", args.joint_steps, args.joint_steps * 6 // 5, 16, 1.5e-3),
        ("answers", args.answer_steps, args.answer_steps, 16, 1e-3),
    ]
    for stage, steps, decay_steps, batch_size, peak in stages:
        resume = args.work / f"{stage}.pt"
        if resume.exists():  # a finished stage, kept so that the next can be tried again
            state = torch.load(resume, weights_only=True)
            model.load_state_dict(state["model"]), heads.load_state_dict(state["heads"])
            number = state["number"]
            continue
        optimizer = optimizer_for(model, heads, stage)
        seen = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, decay_steps, peak)
            size = SIZES[np.random.default_rng([args.seed, step, 2]).integers(len(SIZES))]
            grid = (1, size[1] // PATCH, size[0] // PATCH)
            scenes = lessons.scenes(number, batch_size, size)
            with torch.set_grad_enabled(stage != "answers"):
                features = tower(tower.patches(np.stack([np.asarray(s.image) for s in scenes])), grid)
                loss, right = patch_loss(heads, features, scenes)
            aux, said = loss.item(), float("nan")
            if stage != "tower":
                encoded = [lessons.encode(s, number + i, grid, stage) for i, s in enumerate(scenes)]
                spoken = language_loss(model, features, encoded)
                loss, said = spoken + (0.2 * loss if stage == "joint" else 0.0), spoken.item()
            number += batch_size
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            seen.append((aux, right, said))
            if (step + 1) % 100 == 0:
                a, r, s = np.mean(seen[-100:], axis=0)
                print(
                    f"{stage} {step + 1}/{steps}  patches {a:.3f} ({r:.3f} right)  language {s:.4f}  {time.time() - started:.0f} s",
                    flush=True,
                )
            if (step + 1) % 500 == 0 and stage != "tower":
                save(model, processor, args.work / "latest")
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "heads": heads.state_dict(), "number": number}, resume)
    save(model, processor, args.out)
    print(json.dumps({"seconds": round(time.time() - started), "threads": args.threads, "scenes": number}))


def save(model, processor, out: Path) -> None:
    """bfloat16, as the big ones are published; and half the room in the repository."""
    model.eval()
    copy = Qwen2VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.pad_token_id = model.config.text_config.pad_token_id
    copy.generation_config.eos_token_id = model.config.text_config.eos_token_id
    copy.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    model.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that holds the tokenizer; the checkpoint is written there")
    parser.add_argument("--emoji", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--work", type=Path, default=Path("pretrain-work"), help="folder for intermediate weights")
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--joint-steps", type=int, default=2500)
    parser.add_argument("--answer-steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    train(parser.parse_args())
