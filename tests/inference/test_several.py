"""`caption` and `eval` on several processes, and the comparison at a run's end: one output, that of one process."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import picture
from tests.forks import Forks, fewer_rows
from vlm_lora.config import TrainConfig
from vlm_lora.inference.team import put_together
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

TELLING = """
import sys, vlm_lora.cli.caption as caption, vlm_lora.inference.captioner as captioner, vlm_lora.inference.evaluate as e
caption.GATHER_SECONDS = 0
e.ROWS_AT_ONCE = 5
generate = captioner.Captioner.generate
def telling(self, asked, **how):
    print(f"ANSWERED {sum(len(requests) for _, requests in asked)}", file=sys.stderr)
    return generate(self, asked, **how)
captioner.Captioner.generate = telling
"""
KILLED = """
import os, signal
from vlm_lora.inference.sinks import Rows
write, written = Rows.write, []
def dying(self, *given):
    write(self, *given)
    written.append(given)
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Rows.write = dying
"""


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, checkpoints) -> list[Path]:
    folders = []
    for seed in (1, 2):
        adapter = attach_adapter(
            load_backbone(str(checkpoints["qwen2_vl"])), TrainConfig(data="none", rank=2, alpha=8, seed=seed)
        )
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.3 * seed
        folders.append(tmp_path_factory.mktemp(f"runs{seed}") / f"adapter{seed}")
        adapter.save(folders[-1])
    return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eleven of unlike size, one of them damaged; and questions and captions about all."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(11):
        picture(i, (64 + 16 * (i % 3), 64)).save(folder / f"{i:02}.png")
        rows.append({"image": f"{i:02}.png", "question": "What is it?", "answer": f"Number {i}"})
        rows += [{"image": f"{i:02}.png", "question": f"And {n}?", "answer": str(n)} for n in range(i % 3)]
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:-200])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answered(ended) -> list[int]:
    """How many answers each process gave."""
    return [sum(map(int, re.findall(r"^ANSWERED (\d+)$", end.err, re.MULTILINE))) for end in ended]


@pytest.mark.parametrize("flags", [("jsonl",), ("text", "--num-beams", "2"), ("metadata",)], ids=" ".join)
def test_captions_of_several_processes_are_those_of_one(forks, adapters, checkpoints, pictures, tmp_path, flags):
    images = tmp_path / "images"
    images.mkdir()
    for path in pictures.glob("*.png"):
        (images / path.name).write_bytes(path.read_bytes())
    several = [] if flags[0] == "metadata" else ["--adapter", adapters[1]]
    command = ["caption", images, "--adapter", adapters[0], *several, "--format", *flags, "--max-new-tokens", "6"]
    written, said = [], []
    for count in (1, 2, 3):
        output = images / "metadata.jsonl" if flags[0] == "metadata" else tmp_path / f"{count}"
        ended = forks.run(count, *command, "--output", output, sabotage=TELLING)
        assert [e.code for e in ended] == [3] * count, ended  # one picture is damaged
        assert min(answered(ended)) > 0, "one of them did nothing"
        assert [e.out for e in ended] == [""] * count
        assert "1 of 11 images could not be captioned" in ended[0].err
        assert not any(re.search("images|damaged", e.err) for e in ended[1:])
        said.append(sum(answered(ended)))
        written.append(output.read_bytes())
        output.unlink()
    assert written[1] == written[0]
    assert written[2] == written[0]
    assert len(written[0].splitlines()) == 10 + (flags[0] == "jsonl")
    assert len(set(said)) == 1


def test_on_stdout_and_in_sidecars_only_one_process_writes(forks, adapters, pictures, tmp_path):
    for path in pictures.glob("0[0-3].png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    command = ["caption", tmp_path, "--adapter", adapters[0], "--max-new-tokens", "6"]
    (one,) = forks.run(1, *command)
    two = forks.run(2, *command)
    assert [e.code for e in (one, *two)] == [0, 0, 0], two
    assert (two[0].out, two[1].out) == (one.out, "")
    assert len(one.out.splitlines()) == 4
    listed = forks.run(2, *command, "--dry-run")
    assert [len(e.out.splitlines()) for e in listed] == [4, 0]
    many = forks.run(6, *command, "--format", "sidecar")  # more than there are pictures
    assert [e.code for e in many] == [0] * 6, many
    texts = [line.partition("\t")[2] for line in one.out.splitlines()]
    assert [path.read_text().strip() for path in sorted(tmp_path.glob("*.txt"))] == [text.strip() for text in texts]
    again = forks.run(2, *command, "--format", "sidecar")
    assert "4 images have a caption already" in again[0].err


def test_captions_go_on_after_a_kill_with_another_number_of_processes(forks, adapters, pictures, tmp_path):
    command = ["caption", pictures, "--adapter", adapters[0], "--format", "jsonl", "--max-new-tokens", "6"]
    command += ["--batch-size", "1"]
    forks.run(1, *command, "--output", tmp_path / "one", sabotage=TELLING)
    killed = forks.run(2, *command, "--output", tmp_path / "two", sabotage=TELLING + KILLED)
    assert [e.code for e in killed] == [-9, 1], killed
    assert "lost the others" in killed[1].err
    assert "Traceback" not in killed[1].err
    begun = (tmp_path / "two").read_bytes()
    assert len(begun.splitlines()) == 5
    assert (tmp_path / "one").read_bytes().startswith(begun)
    ended = forks.run(3, *command, "--output", tmp_path / "two", sabotage=TELLING)
    assert "5 images have a caption already" in ended[0].err
    assert sum(answered(ended)) == 5  # the damaged one is none
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.parametrize("how", ["--blank --swap --also", "--against"])
def test_an_evaluation_by_several_processes_is_that_of_one(forks, adapters, pictures, tmp_path, how):
    command = ["eval", pictures / "rows.jsonl", "--adapter", adapters[0], "--max-new-tokens", "6", *how.split()]
    command.append(adapters[1] if how == "--against" else pictures / "rows.jsonl")
    outs, given = [], []
    for count in (1, 2, 3):
        output = tmp_path / f"{count}"
        ended = forks.run(count, *command, "--json", "--output", output, sabotage=TELLING)
        assert [e.code for e in ended] == [3] * count, ended
        assert min(answered(ended)) > 0
        assert all(e.out == "" and "Report" not in e.err for e in ended[1:])
        outs.append([ended[0].out, *((output / name).read_bytes() for name in ("predictions.jsonl", "scores.json"))])
        given.append(sum(answered(ended)))
        assert len(re.findall(r"^Answers: (\d+) of \1$", ended[0].err, re.MULTILINE)) == 1 + ("--also" in how)
    assert outs[1] == outs[0]
    assert outs[2] == outs[0]
    assert given == given[:1] * 3
    assert json.loads(outs[0][0])["examples"] == 10


def test_a_second_look_by_several_processes_is_that_of_one(forks, adapters, pictures, tmp_path):
    command = ["eval", pictures / "rows.jsonl", "--adapter", adapters[0], "--review"]
    (one,), two = (forks.run(count, *command) for count in (1, 2))
    assert [e.code for e in (one, *two)] == [3, 3, 3], two
    assert (two[0].out, two[1].out) == (one.out, "")
    assert len(one.out.splitlines()) == 21


def test_the_comparison_at_the_end_of_a_run_is_made_by_all(forks, adapters, checkpoints, pictures, tmp_path):
    """What they answer is what one process answers with the same adapter."""
    rows = (pictures / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, first, last in (("train", 0, 4), ("val", 6, 10)):
        (tmp_path / name).mkdir()
        images = [f"{i:02}.png" for i in range(first, last + 1)]
        for image in images:
            (tmp_path / name / image).write_bytes((pictures / image).read_bytes())
        part = [row for row in rows if json.loads(row)["image"] in images]
        (tmp_path / name / "rows.jsonl").write_text("".join(part))
    flags = ["--model", checkpoints["qwen2_vl"], "--rank", "4", "--max-steps", "3", "--lr", "1e-2"]
    val = tmp_path / "val/rows.jsonl"
    command = ["train", tmp_path / "train/rows.jsonl", *flags, "--val", val, "--output", tmp_path / "run"]
    ended = forks.run(2, *command, sabotage=TELLING)
    assert [e.code for e in ended] == [0, 0], ended
    assert min(answered(ended)) > 0
    assert "Base against tuned, held out" in ended[0].out
    assert ended[1].out == ""
    (one,) = forks.run(1, "eval", val, "--adapter", tmp_path / "run", "--output", tmp_path / "eval", sabotage=TELLING)
    assert one.code == 0, one
    assert sum(answered(ended)) == answered([one])[0]
    assert (tmp_path / "run/predictions.jsonl").read_bytes() == (tmp_path / "eval/predictions.jsonl").read_bytes()


def test_what_several_processes_cannot_share_is_refused(forks, adapters, pictures, tmp_path):
    served = ["--endpoint", "http://127.0.0.1:9/v1"]
    for command in (["caption", pictures, *served], ["eval", pictures / "rows.jsonl", *served]):
        ended = forks.run(2, *command)
        assert [e.code for e in ended] == [2, 2]
        assert "one process asks a server" in ended[0].err
    command = ["caption", pictures, "--adapter", adapters[0]]
    sharded = forks.run(2, *command, env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert [e.code for e in sharded] == [2, 2]
    assert "FSDP2 is for train" in sharded[0].err
    missing = forks.run(2, "caption", tmp_path / "nowhere", "--adapter", adapters[0])
    assert [e.code for e in missing] == [2, 2]
    assert "there is no such file or folder" in missing[0].err
    fewer = fewer_rows("vlm_lora.data.readers", "read_dataset")
    unlike = forks.run(2, "eval", pictures / "rows.jsonl", "--adapter", adapters[0], sabotage=fewer)
    assert [e.code for e in unlike] == [1, 1]
    assert "need the same data" in unlike[0].err


def test_shares_are_put_together_as_they_were():
    for count in (1, 2, 3, 9):
        for length in range(8):
            items = list(range(length))
            assert put_together([items[i::count] for i in range(count)]) == items
