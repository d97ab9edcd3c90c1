"""What was trained against what an engine says of it: word for word, on vLLM's CPU build and llama.cpp.

    python -m bench.engines                      # the matrix, about an hour on two cores; environments of its own
    python -m bench.engines --small              # merged, Qwen2-VL, vLLM: five minutes; skipped where it is not set up
    python -m bench.engines --speed              # images a second through vLLM beside our own loop, by turns

An adapter is trained on four pictures for each family and method, on a random base with the real Qwen2 vocabulary, so
that what it says is its own. It is served on loopback, merged and as an adapter on its base, and asked by `vlm-lora
caption --endpoint` and `vlm-lora eval --endpoint` about pictures of odd sizes, a photo turned by EXIF, a transparent
and a 16-bit one, two pictures at once, a conversation, a question with special-token text. The same is asked of our
own loop. A cell is what came of it:

- the same words; or another word where our own model's two choices differ by less than MARGIN in log-probability, which
  is counted apart, as a tie; or another word, which is a failure.
- the largest difference between the engine's log-probability of a token and ours, where the engine tells it.
- refused by us before anything was sent, with the reason.

Two faults are planted and must be seen: the projector's part of an adapter left out, and another `max_pixels`.
Numbers are of what is said, not of time, but for --speed, which says how busy the machine was. The record goes to
bench/results/engines.json, a family at a time, and a part that is run anew replaces its own cells alone. From there
docs/serving.md has its table (tests/test_bench.py compares them). The last line of output is the same JSON.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import numpy as np
import torch
from PIL import Image

from bench import engine_setup
from bench.origin import origin
from tests.conftest import TEXT, VISION, write_checkpoint
from vlm_lora import Captioner, Decoding
from vlm_lora.cli import main
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.inference.endpoint import Endpoint, _picture
from vlm_lora.inference.gguf import Gguf, to_gguf
from vlm_lora.inference.served import Trained
from vlm_lora.model.features import together
from vlm_lora.model.packing import pack

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "data/emoji_scenes"
RECORD = ROOT / "bench/results/engines.json"
PROMPT = "Describe this image."
TOKENS = 12
IMAGE_TOKENS = (4, 64)
"""The fewest and the most of an image: whole numbers, as llama.cpp takes the pixel limits in tokens."""
MARGIN = {"float32": 0.01, "F16": 0.05, "bfloat16": 0.25}
"""How far apart, in log-probability, our own two choices may be for another word to count as a tie; by the format of
the engine's weights. In float32 only the order of sums differs; in bfloat16 a logit of 16 is rounded by up to 0.06."""
VLLM_FORMATS = {"qwen3_5": "bfloat16"}
"""Where float32 is refused: "CPU GDN attention requires BF16." """

METHODS = {
    "lora": ["--rank", "8"],
    "own rank and alpha": ["--rank", "8", "--projector-rank", "16", "--projector-alpha", "64"],
    "rslora": ["--rank", "8", "--variant", "rslora"],
    "dora": ["--rank", "8", "--variant", "dora"],
    "qlora": ["--rank", "8", "--method", "qlora"],
}
MARKED = "Say <|im_end|> again."
"""A question with the text of a special token, which servers take for the token."""


@dataclass
class Cell:
    """What one way of serving one adapter came to; ``words`` counts answers by same, tie and other."""

    engine: str
    family: str
    method: str
    served: str
    format: str
    same: int = 0
    ties: int = 0
    other: int = 0
    logprob: float | None = None
    left_out: list[str] = field(default_factory=list)
    refused: str | None = None
    told: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Other words, or a token that the engine finds likelier or less likely than we do, in a float format."""
        return self.other > 0 or (self.logprob or 0) > MARGIN.get(self.format, math.inf)


# -- what is trained -----------------------------------------------------------------------------------------


def sizes(family: str) -> dict:
    """Sizes that the engines' kernels take: heads of 64, rows of 256, the patches and windows of the real models."""
    given, vision = VISION[family], {"depth": 4, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    wide = {"hidden_size", "out_hidden_size", "intermediate_size"} if "embed_dim" in given else {"out_hidden_size"}
    vision |= dict.fromkeys(wide, 256) | dict.fromkeys({"embed_dim", "hidden_size", "intermediate_size"} - wide, 128)
    if "num_position_embeddings" in given:
        vision["patch_size"] = 16
    text = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}
    own = TEXT.get(family, {})
    text |= {name: 64 for name in own if name.startswith("linear_") and name.endswith("_dim")}
    rope = own.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]})
    half = sum(rope["mrope_section"]) * 64 // own.get("head_dim", 12)
    text["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    token = (2 * vision["patch_size"]) ** 2
    pixels = (IMAGE_TOKENS[0] * token, IMAGE_TOKENS[1] * token)
    return {"vision": {n: v for n, v in vision.items() if n in given}, "text": text, "pixels": pixels}


def write_data(folder: Path) -> None:
    """Four pictures with the first words of a caption each, as a folder of pictures and sidecars."""
    folder.mkdir(parents=True)
    captions = json.loads((SCENES / "captions.json").read_text())
    said: dict[int, str] = {}
    for row in captions["annotations"]:
        said.setdefault(row["image_id"], row["caption"])
    for row in captions["images"][:4]:
        with Image.open(SCENES / "images" / row["file_name"]) as image:
            image.convert("RGB").resize((112 + 28 * (row["id"] % 3), 112)).save(folder / row["file_name"])
        (folder / row["file_name"]).with_suffix(".txt").write_text(" ".join(said[row["id"]].split()[:4]))


def write_questions(folder: Path, learnt: Path) -> list[str]:
    """Pictures to caption, in all the forms that loaders disagree on, and rows.jsonl with what is asked beside."""
    folder.mkdir(parents=True)
    files = sorted(learnt.glob("*.png"))
    for file in files[:3]:
        shutil.copy(file, folder / file.name)
    photo = Image.open(files[3]).convert("RGB")
    photo.resize((97, 61), Image.Resampling.BICUBIC).save(folder / "odd.png")
    photo.resize((700, 500), Image.Resampling.BICUBIC).save(folder / "large.png")
    photo.resize((5, 3), Image.Resampling.BICUBIC).save(folder / "small.png")
    photo.resize((640, 2), Image.Resampling.BICUBIC).save(folder / "thin.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.resize((160, 100)).save(folder / "turned.jpg", exif=exif, quality=95)
    clear = photo.resize((120, 120)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((120, 120)))
    clear.save(folder / "clear.png")
    Image.fromarray(np.arange(112 * 112, dtype="uint16").reshape(112, 112) * 5).save(folder / "deep.png")
    told = lambda role, text: {"role": role, "content": text}  # noqa: E731
    one, two = files[0].name, files[1].name
    rows = [
        {"images": [one, two], "messages": [told("user", PROMPT), told("assistant", "two")]},
        {"images": [two], "messages": [told("user", PROMPT), told("assistant", "a cat"),
                                       told("user", "What else?"), told("assistant", "a dog")]},
        {"images": [one], "messages": [told("user", MARKED), told("assistant", "no")]},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(str(path) for path in folder.iterdir() if path.suffix in (".png", ".jpg"))


def train(data: Path, base: str, run: Path, flags: list[str]) -> None:
    command = ["train", str(data), "--model", base, "--output", str(run), "--prompt", PROMPT, "--val-split", "0",
               "--epochs", "50", "--batch-size", "4", "--lr", "5e-3", "--dtype", "float32", "--no-cache",
               *flags]  # fmt: skip
    quiet(command)


def quiet(command: list[str]) -> tuple[int, str, str]:
    """A command of vlm-lora in this process: its exit code, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    if code not in (0, 1, 2, 3) or (code and command[0] in ("train", "merge")):
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{err.getvalue()}")
    return code, out.getvalue(), err.getvalue()


# -- what is said --------------------------------------------------------------------------------------------


@dataclass
class Said:
    """Captions by file, answers by question, and what was left out, by the words of the error."""

    captions: dict[str, str]
    answers: dict[str, str]
    left_out: list[str]
    refused: str | None = None


def ask(questions: Path, files: list[str], how: list[str], folder: Path) -> Said:
    """What `vlm-lora caption` and `vlm-lora eval` give with these flags."""
    output = folder / "captions.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    limit = ["--max-new-tokens", str(TOKENS)]
    code, _, err = quiet(["caption", *files, *how, *limit, "--format", "jsonl", "--output", str(output)])
    if code in (1, 2):
        return Said({}, {}, [], refused=err.strip().splitlines()[-1].removeprefix("vlm-lora: "))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    captions = {Path(row["image"]).name: row["caption"] for row in rows if row.get("caption") is not None}
    left_out = [f"{Path(row['image']).name}: {row['error']}" for row in rows if row.get("error")]
    code, _, err = quiet(["eval", str(questions / "rows.jsonl"), *how, *limit, "--output", str(folder / "eval")])
    if code in (1, 2):
        return Said(captions, {}, [*left_out, err.strip().splitlines()[-1]])
    answers = {}
    for line in (folder / "eval/predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[f"{'+'.join(row['images'])}: {row['question']}"] = row.get("tuned", row["base"])
    left_out += [line for line in err.splitlines() if line.startswith("Left out: ")]
    return Said(captions, answers, left_out)


class Ours:
    """Our own loop's words and log-probabilities of one adapter."""

    def __init__(self, run: Path, questions: Path, files: list[str], folder: Path, dtype: str):
        self.captioner = Captioner.load(adapter=run, dtype=dtype)
        self.trained = Trained.load(run)
        self.questions, self.files = questions, files
        self.said = ask(questions, files, ["--adapter", str(run), "--dtype", dtype], folder)
        assert not self.said.refused, self.said.refused

    @torch.no_grad()
    def log_probabilities(self, file: str, text: str) -> tuple[list[int], torch.Tensor]:
        """The tokens of a caption and its end, and ``(tokens, vocabulary)`` what we expect at each."""
        captioner = self.captioner
        (entry,) = captioner.features.get([_picture_of(file)])
        encoded = captioner.encoder.encode([Dialogue((Turn(PROMPT, text),))], entry.grid_thw[None])
        row = pack([[encoded]], captioner.backbone.pad_token_id)
        device = captioner.backbone.device
        mask, positions = row.attention_mask.to(device), row.position_ids.to(device)
        seen = together([entry], device)
        hidden = captioner.backbone.forward(row.input_ids, mask, positions, seen, forks=row.forks)
        labels = row.labels[:, 1:]
        logits = captioner.backbone.logits(hidden[:, :-1][(labels != -100).to(device)]).float()
        return labels[labels != -100].tolist(), logits.log_softmax(-1).cpu()

    def gap(self, file: str, theirs: str) -> float:
        """How much likelier our choice was than theirs at the first token where a caption differs."""
        name = Path(file).name
        mine, expected = self.log_probabilities(file, self.said.captions[name])
        other, _ = self.log_probabilities(file, theirs)
        place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        return float("inf") if place is None else float(expected[place, mine[place]] - expected[place, other[place]])

    def compare(self, cell: Cell, said: Said) -> Cell:
        margin = MARGIN.get(cell.format, MARGIN["F16"])
        if said.refused:
            cell.refused = said.refused
            return cell
        files = {Path(file).name: file for file in self.files}
        for name, mine in self.said.captions.items():
            if name not in said.captions:
                continue
            if (theirs := said.captions[name]) == mine:
                cell.same += 1
                continue
            gap = self.gap(files[name], theirs)
            cell.ties += gap < margin
            cell.other += not gap < margin
            cell.told.append(f"{name}: {theirs!r}, ours {mine!r} (likelier by {gap:.3g})")
        for question, mine in self.said.answers.items():
            if question in said.answers:
                cell.same += said.answers[question] == mine
                cell.other += said.answers[question] != mine
                if said.answers[question] != mine:
                    cell.told.append(f"{question}: {said.answers[question]!r}, ours {mine!r}")
        cell.left_out = said.left_out
        return cell

    def probabilities(self, url: str, model: str) -> float | None:
        """The largest difference between the server's log-probabilities of three captions' tokens and ours."""
        worst = None
        for file in self.files[:3]:
            _, address = _picture(_picture_of(file), self.trained)
            content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": PROMPT}]
            body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS,
                    "temperature": 0.0, "logprobs": True, "top_logprobs": 1}  # fmt: skip
            choice = (
                httpx.post(f"{url}/chat/completions", json=body, timeout=300).raise_for_status().json()["choices"][0]
            )
            if choice["message"]["content"].strip() != self.said.captions[Path(file).name] or not choice.get(
                "logprobs"
            ):
                continue
            ids, expected = self.log_probabilities(file, self.said.captions[Path(file).name])
            for i, token in enumerate(choice["logprobs"]["content"][: len(ids)]):
                worst = max(worst or 0.0, abs(token["logprob"] - float(expected[i, ids[i]])))
        return worst


def _picture_of(file: str):
    from vlm_lora.inference.caption import source_of

    return source_of(file)


# -- what serves ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """The URL of a server, once it answers; the process and its children end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/models", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[0]} did not come up; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def vllm_format(family: str) -> str:
    return VLLM_FORMATS.get(family, "float32")


def vllm(home: Path, format: str, model: str, *flags: str) -> tuple[list[str], dict[str, str]]:
    command = [str(home / "vllm/bin/vllm"), "serve", model, "--dtype", format, "--enforce-eager", "--max-model-len",
               "1024", "--skip-mm-profiling", "--generation-config", "vllm", "--limit-mm-per-prompt",
               '{"image": 2, "video": 0}', *flags]  # fmt: skip
    return command, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
                     "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def llama(home: Path, gguf: Gguf, model: Path) -> tuple[list[str], dict[str, str]]:
    """As `merge --gguf` says; the cache of keys and values is as exact as the weights."""
    named = shlex.split(replace(gguf, model=model).command)[1:]
    command = [str(home / "llamacpp/build/bin/llama-server"), *named, "--ctx-size", "4096", "--parallel", "1",
               "--threads", "2", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # fmt: skip
    return command, {}


def convert(home: Path, merged: Path) -> Gguf:
    source = home / "llamacpp/source"
    os.environ["PYTHONPATH"] = f"{source / 'gguf-py'}:{home / 'llamacpp/converter'}"
    try:
        return to_gguf(merged, source / "convert_hf_to_gguf.py")
    finally:
        del os.environ["PYTHONPATH"]


def quantise(home: Path, model: Path, format: str) -> Path:
    output = model.with_name(model.name.replace("F16", format))
    command = [str(home / "llamacpp/build/bin/llama-quantize"), str(model), str(output), format]
    subprocess.run(command, capture_output=True, check=True)
    return output


# -- the matrix ----------------------------------------------------------------------------------------------


class Matrix:
    """The cells of one run, and where they were made."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work, self.home = options, work, options.home
        self.cells: list[Cell] = []
        self.faults: list[dict] = []
        self.learnt, self.questions = work / "learnt", work / "questions"
        write_data(self.learnt)
        self.files = write_questions(self.questions, self.learnt)

    def family(self, family: str) -> None:
        work = self.work / family
        base = write_checkpoint(work / "base", family, engine_setup.tokenizer(self.home), **sizes(family))
        runs: dict[str, Path] = {}
        ours: dict[str, Ours] = {}
        for method in self.options.methods:
            runs[method] = work / method.replace(" ", "-")
            train(self.learnt, str(base), runs[method], METHODS[method])
            ours[method] = Ours(runs[method], self.questions, self.files, work / "ours", vllm_format(family))
            tell(f"{family}, {method}: ours says {ours[method].said.captions}")
            merged = runs[method].with_name(f"{runs[method].name}-merged")
            quiet(["merge", str(runs[method]), str(merged), "--dtype", "float32"])
            if "vllm" in self.options.engines:
                self.vllm_merged(family, method, runs[method], merged, ours[method])
            if "llamacpp" in self.options.engines:
                self.llamacpp(family, method, runs[method], merged, ours[method])
            shutil.rmtree(merged)
        if "vllm" in self.options.engines and not self.options.small:
            self.vllm_adapters(family, base, runs, ours)

    def asked(self, cell: Cell, url: str, model: str, run: Path, ours: Ours) -> Cell:
        how = ["--endpoint", url, "--model", model, "--adapter", str(run), "--concurrency", "2"]
        ours.compare(cell, ask(self.questions, self.files, how, self.work / "theirs"))
        if not cell.refused:
            cell.logprob = ours.probabilities(url, model)
        self.cells.append(cell)
        tell(json.dumps(asdict(cell)))
        return cell

    def vllm_merged(self, family: str, method: str, run: Path, merged: Path, ours: Ours) -> None:
        with serving(
            *vllm(self.home, vllm_format(family), str(merged), "--served-model-name", "merged"), self.work / "vllm.log"
        ) as url:
            self.asked(Cell("vllm", family, method, "merged", vllm_format(family)), url, "merged", run, ours)
        if method == "lora":
            least, most = ours.captioner.backbone.pixel_limits
            other = json.dumps({"min_pixels": least, "max_pixels": most // 8})
            flags = ("--served-model-name", "merged", "--mm-processor-kwargs", other)
            with serving(*vllm(self.home, vllm_format(family), str(merged), *flags), self.work / "vllm.log") as url:
                how = ["--endpoint", url, "--model", "merged", "--adapter", str(run)]
                said = ask(self.questions, self.files, how, self.work / "theirs")
                told = [said.refused or "", *said.left_out]
                how = next((text for text in told if " tokens on the server" in text), "").rpartition("/questions/")[2]
                self.planted(family, "another max_pixels", bool(how), how)

    def planted(self, family: str, fault: str, seen: bool, how: str) -> None:
        self.faults.append({"engine": "vllm", "family": family, "fault": fault, "seen": seen, "how": how})
        tell(json.dumps(self.faults[-1]))

    def vllm_adapters(self, family: str, base: Path, runs: dict[str, Path], ours: dict[str, Ours]) -> None:
        """All adapters on one base, and the planted one, which lacks its projector's part."""
        named = {method: method.replace(" ", "-") for method in runs if method not in ("dora", "qlora")}
        modules = [f"{name}={runs[method] / 'adapter'}" for method, name in named.items()]
        if "lora" in runs:
            modules.append(f"planted={without_projector(runs['lora'] / 'adapter', base.parent / 'planted')}")
        flags = ["--served-model-name", "base", "--enable-lora", "--enable-tower-connector-lora", "--max-lora-rank",
                 "16", "--max-loras", "4", "--lora-modules", *modules]  # fmt: skip
        if options := next(iter(ours.values())).captioner.backbone.family.template_options:
            flags += ["--default-chat-template-kwargs", json.dumps(options)]
        with serving(*vllm(self.home, vllm_format(family), str(base), *flags), self.work / "vllm.log") as url:
            for method in runs:
                cell = Cell("vllm", family, method, "adapter", vllm_format(family))
                self.asked(cell, url, named.get(method, "lora"), runs[method], ours[method])
            how = ["--endpoint", url, "--model", "planted", "--prompt", PROMPT]
            cell = Cell("vllm", family, "lora", "adapter", vllm_format(family))
            ours["lora"].compare(cell, ask(self.questions, self.files, how, self.work / "theirs"))
            self.planted(
                family, "the projector's part left out", cell.fails, f"{cell.other} other, {cell.same} the same"
            )

    def llamacpp(self, family: str, method: str, run: Path, merged: Path, ours: Ours) -> None:
        gguf = convert(self.home, merged)
        for format in ("F16",) if method != "lora" else ("F16", "Q8_0", "Q4_K_M"):
            file = gguf.model if format == "F16" else quantise(self.home, gguf.model, format)
            with serving(*llama(self.home, gguf, file), self.work / "llama.log") as url:
                name = httpx.get(f"{url}/models").json()["data"][0]["id"]
                self.asked(Cell("llamacpp", family, method, "merged", format), url, name, run, ours)


def without_projector(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter that lacks the tensors of the projector."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "merger" not in n}, folder / "adapter_model.safetensors")
    return folder


def with_others(record: dict, file: Path) -> dict:
    """The record, and what an earlier one in the file holds beside: the matrix may be run in parts."""
    before = json.loads(file.read_text()) if file.is_file() else {"cells": [], "faults": [], "engines": {}}
    keys = {"cells": ("engine", "family", "method", "served", "format"), "faults": ("engine", "family", "fault")}
    for part, names in keys.items():
        new = {tuple(row[name] for name in names) for row in record[part]}
        kept = [row for row in before[part] if tuple(row[name] for name in names) not in new]
        record[part] = sorted(kept + record[part], key=lambda row: _order(row, names))
    return record | {"engines": before["engines"] | record["engines"]}


def _order(row: dict, names: tuple[str, ...]) -> list[int | str]:
    known = [*VISION, *METHODS, "vllm", "llamacpp", "merged", "adapter", "float32", "bfloat16", "F16", "Q8_0", "Q4_K_M"]
    return [known.index(row[name]) if row[name] in known else len(known) for name in names if name != "engine"]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(record: dict) -> str:
    """The matrix as docs/serving.md shows it: a line for each family and method, a column for each way of serving."""
    columns = list(dict.fromkeys((c["engine"], c["served"], c["format"]) for c in record["cells"]))
    rows = list(dict.fromkeys((c["family"], c["method"]) for c in record["cells"]))
    cells = {(c["family"], c["method"], c["engine"], c["served"], c["format"]): c for c in record["cells"]}

    def text(cell: dict | None) -> str:
        if cell is None:
            return "not run"
        if cell["refused"]:
            return "refused"
        asked = cell["same"] + cell["ties"] + cell["other"]
        said = f"{cell['same']} of {asked}"
        return said + (f", {cell['ties']} ties" if cell["ties"] else "")

    names = {"vllm": "vLLM", "llamacpp": "llama.cpp"}
    head = ["family", "method", *(f"{names[e]}, {s}, {f}" for e, s, f in columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[*row, *(text(cells.get((*row, *column))) for column in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=("vllm", "llamacpp"), default=["vllm", "llamacpp"])
    parser.add_argument("--families", nargs="+", choices=tuple(VISION), default=list(VISION))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--home", type=Path, default=ROOT / "build/engines", help="where the engines are set up")
    parser.add_argument("--small", action="store_true", help="merged, Qwen2-VL, vLLM; nothing is set up for it")
    parser.add_argument("--speed", action="store_true", help="images a second through vLLM beside our own loop")
    parser.add_argument("--images", type=int, default=64, help="of --speed")
    parser.add_argument("--repeat", type=int, default=3, help="turns of --speed")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE")
    options = parser.parse_args()
    options.home = options.home.resolve()
    if options.small:
        options.engines, options.families, options.methods = ["vllm"], ["qwen2_vl"], ["lora"]
        if not (options.home / "vllm/bin/vllm").is_file():
            print(f"Skipped: vLLM is not set up in {options.home}; python -m bench.engines does so.")
            return 0
    else:
        for engine in options.engines:
            engine_setup.set_up(engine, options.home)
    with tempfile.TemporaryDirectory() as work:
        os.environ["VLM_LORA_CACHE"] = f"{work}/cache"
        if options.speed:
            print(json.dumps(speed(options, Path(work))))
            return 0
        matrix = Matrix(options, Path(work))
        for family in options.families:
            matrix.family(family)
            record = recorded(matrix, options)  # a family at a time: it takes hours
    failed = [cell for cell in matrix.cells if cell.fails and cell.format in MARGIN]
    unseen = [fault for fault in matrix.faults if not fault["seen"]]
    tell(table(record))
    told = (
        f"{len(matrix.cells)} cells, {len(failed)} not as trained; {len(matrix.faults)} faults, {len(unseen)} unseen."
    )
    tell(told)
    print(json.dumps(record))
    return 1 if failed or unseen else 0


def recorded(matrix: Matrix, options: argparse.Namespace) -> dict:
    """What the matrix came to so far, in the record's file too unless it is the small form."""
    record = origin("engines", f"{os.cpu_count()} CPU cores, shared with others") | {
        "engines": engine_setup.versions(options.home, options.engines), "margin": MARGIN, "faults": matrix.faults,
        "cells": [asdict(cell) for cell in matrix.cells],
    }  # fmt: skip
    if options.small:
        return record
    record = with_others(record, options.record)
    options.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def speed(options: argparse.Namespace, work: Path) -> dict:
    """Images a second: a folder captioned through vLLM and by our own loop, by turns: a busy machine slows both.

    Both are up and warm, and have the base's weights in float32. What it takes to start is not counted.
    """
    write_data(work / "learnt")
    base = write_checkpoint(work / "base", "qwen2_vl", engine_setup.tokenizer(options.home), **sizes("qwen2_vl"))
    train(work / "learnt", str(base), work / "run", METHODS["lora"])
    quiet(["merge", str(work / "run"), str(work / "merged"), "--dtype", "float32"])
    captioner = Captioner.load(str(work / "merged"), dtype="float32")
    files = sorted((SCENES / "images").glob("*.png"))[: options.images]
    decoding = Decoding(max_new_tokens=TOKENS)
    rates: dict[str, list[float]] = {"vllm": [], "ours": []}
    with serving(
        *vllm(options.home, "float32", str(work / "merged"), "--served-model-name", "m"), work / "vllm.log"
    ) as url:
        trained = Trained.load(work / "merged")
        endpoint = Endpoint(url, model="m", trained=trained, timeout=600)
        ways = {
            "vllm": lambda: list(endpoint.caption(files, PROMPT, decoding=decoding)),
            "ours": lambda: list(captioner.caption(files, PROMPT, decoding=decoding)),
        }
        for turn in range(1 + options.repeat):
            said = {}
            for who, work_of in ways.items():
                started = time.monotonic()
                said[who] = [caption.text for caption in work_of()]
                if turn:  # the first warms up
                    rates[who].append(len(files) / (time.monotonic() - started))
    same = sum(one == other for one, other in zip(*said.values(), strict=True))
    return origin("engines", f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}") | {
        "images": len(files), "same_words": same, "images_per_second": rates,
        "vllm_over_ours": statistics.median(rates["vllm"]) / statistics.median(rates["ours"]),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run())
