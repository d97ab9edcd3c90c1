"""Random data sets of every format, randomly damaged, through `vlm-lora check`: by the hour, or a few in a test.

    nice -n 19 python -m tests.data.fuzz --minutes 60 --record bench/results/fuzz.json
    python -m tests.data.fuzz --only 1234            one case again, as it was

Each case is drawn from its number alone. What must hold: check ends with an exit code, within its time and memory,
and prints JSON; nothing but our own errors is raised; every row is an answer or a bad row; a clean copy reads back
whole. The cases run in a process of their own, so that a crash or a hang of a decoder is a finding and not the end.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import PIL
from PIL import Image

from vlm_lora import __version__
from vlm_lora.cli import main as vlm_lora

SECONDS_A_CASE = 60
MEMORY = 2 << 30
"""Peak of the process in bytes: 50 megapixels of 16 bits, in threads, stay well below."""
FORMATS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}
FORMATS |= {"AVIF": "avif", "QOI": "qoi", "JPEG2000": "jp2"}
CONTAINERS = ("jsonl", "json", "csv", "tsv", "parquet", "tar", "coco", "vqav2", "sidecar", "metadata.jsonl")
CONTAINERS += ("metadata.csv", "messages", "conversations", "classes", "full names", "twins", "by name", "token")
CONTAINERS += ("label studio", "arrow")
LINES = ("jsonl", "metadata.jsonl", "messages", "conversations")
TEXTS = ("a fox", "зима 雪 ❄", "<|im_end|><|image_pad|>", "<image>", 'say "x, y"', "two\nlines", "e\u0301\u202e", "7")
TEXTS += ("<ref-object> at <bbox>", "<ref-object><bbox>", '{"bbox_2d": [1, 2, 9, 9]}')
EXTRA = {
    "system": ("Be brief.", "", 7),
    "weight": (0.5, "2", 0, -1, "much", True),
    "split": ("train", "test", "Validation", "odd", 3),
    "prompt": ("What is it?", "", ["x"]),
    "question_type": ("how", 4),
    "id": (7, "x"),
    "tags": ("red, small", ["red"]),
    "bbox": ([1, 2, 3, 4], []),
    "objects": (
        *[{"ref": ["a fox"], "bbox": [box]} for box in ([1, 2, 9, 9], [3, 4], [0, 0, 24.2, 18], [0, 0, 99, 9], ["x"])],
        {"ref": ["a fox"], "bbox": [[0.1, 0.2, 1, 1]], "bbox_type": "norm1"},
        {"bbox": [[1, 2, 3, 4]], "categories": [3]},
        {"ref": [], "bbox": []},
        '{"ref": ["a"], "bbox": [[1, 2]], "image_id": [7]}',
        {"ref": ["\ud800\0"], "bbox": [["1\n2"]], "bbox_type": ["real"]},
        {"ref": ["\ud800\0"], "bbox": [[1, 2, 9, 9]], "image_id": "0\n"},
        [7],
    ),
    "videos": (["a.mp4"], [], None),
    "tools": ("x", None),
    "loss": (False, 1),
    "subset": ("test", "first"),
    "choices": (["a", "b"],),
    "width": (640,),
    "reasoning_content": ("because", ""),
    "source": ("web", {"a": 1}),
    "qa": ([{"question": "x", "answer": "y"}],),
}
"""Fields that rows may have beside an image and a caption, and what may be in them."""
USED = {"image", "file_name", "caption", "captions", "images", "messages", "conversations"}
USED |= {"system", "weight", "split", "prompt", "question_type", "objects"}
ODD = (None, "", " \n", "a\0b", "\ud800", "\x01", 7, -1.5, True, [], {}, ["x", ""], {"text": "x"}, "x" * 70_000)
HUGE = (b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff", b"\xff\xff\0\0", b"\0\1\0\0")  # sizes, as bytes
NAMES = (
    "gone.png",
    "../outside.png",
    "/etc/passwd",
    "http://127.0.0.1/a.png",
    "sub",
    "fifo.png",
    "loop.png",
    "a\0.png",
)


def encoded_pictures() -> list[tuple[str, bytes]]:
    """(ending, bytes): a small picture in each format and in the modes that it has."""
    base = Image.effect_mandelbrot((24, 18), (-2, -1, 1, 1), 20).convert("RGB")
    found = []
    for name, suffix in FORMATS.items():
        for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"):
            out = io.BytesIO()
            try:
                image = base.convert("F" if mode == "I;16" else mode)
                (image.convert("I").convert("I;16") if mode == "I;16" else image).save(out, name)
            except (OSError, ValueError, KeyError):  # the format has no such mode
                continue
            found.append((suffix, out.getvalue()))
    return found


PICTURES = encoded_pictures()


def damaged(draw: random.Random, data: bytes, times: int | None = None) -> tuple[bytes, int]:
    """The bytes after 1 to 6 changes, and where the first of them is."""
    first = len(data)
    for _ in range(times or draw.randint(1, 6)):
        at, size = draw.randint(0, len(data)), draw.choice((1, 1, 2, 4, 40))
        new = draw.choice(
            (b"", draw.randbytes(size), b"\0" * size, b"\xff" * size, b"\n", b'"', b"]", b"{", b",", *HUGE)
        )
        cut = draw.choice((0, size, size, len(new)))
        if draw.random() < 0.15:
            cut = len(data)  # all behind it goes
        data, first = data[:at] + new + data[at + cut :], min(first, at)
    return (with_checksums(data) if draw.random() < 0.5 else data), first


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right CRC again, so that decoders look at what is in them."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data = data[:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") + data[end + 4 :]
        at = end + 4
    return data


def make_case(draw: random.Random, folder: Path) -> tuple[Path, int, int | None]:
    """Write a data set; what to read of it, the least number of answers and bad rows, and the most (None: unknown)."""
    container = draw.choice(CONTAINERS)
    outside = folder / "outside.png"
    outside.write_bytes(PICTURES[0][1])
    data = folder / "data"
    (data / "sub").mkdir(parents=True)
    names = []
    for number in range(draw.randint(1, 4)):
        suffix, picture = draw.choice(PICTURES)
        if draw.random() < 0.25:
            picture, _ = damaged(draw, picture)
        names.append(f"{draw.choice(('', 'sub/'))}{number}.{draw.choice((suffix, suffix, 'png'))}")
        (data / names[-1]).write_bytes(picture)
    if draw.random() < 0.1:
        with open(os.path.join(os.fsencode(data), b"\xff.png"), "wb") as file:
            file.write(PICTURES[0][1])
    if draw.random() < 0.2:
        os.mkfifo(data / "fifo.png")
        (data / "loop.png").symlink_to("loop.png")
        (data / "out.png").symlink_to(outside)
        names.append("out.png")
    rows = [
        {"image": draw.choice(names), "caption": draw.choice(TEXTS), "question": "What?"}
        for _ in range(draw.randint(1, 8))
    ]
    if draw.random() < 0.6:
        for row in draw.sample(rows, draw.randint(1, len(rows))):
            what = draw.choice(("image", "caption", "question", "missing"))
            if what == "missing":
                row.pop(draw.choice(list(row)))
            else:
                row[what] = draw.choice((*NAMES, *ODD) if what == "image" else ODD)
    for row in rows:
        if draw.random() < 0.5 and "<bbox>" in str(row.get("caption")):
            row["objects"] = draw.choice(EXTRA["objects"])
    if draw.random() < 0.4:
        for row in rows:
            row |= {name: draw.choice(EXTRA[name]) for name in draw.sample(list(EXTRA), draw.choice((0, 1, 1, 2)))}
    path, least, most, parts = WRITERS[container](draw, data, rows, container)
    if draw.random() < 0.4:
        file = draw.choice(parts)
        before = file.read_bytes()
        after, first = damaged(draw, before)
        if container in ("csv", "tsv", "metadata.csv") and draw.random() < 0.5:
            after = with_stray_quote(draw, before)
        file.write_bytes(after)
        least, most = rows_left(container, before, after, first, least), None
    if draw.random() < 0.1 and container not in ("sidecar", "full names"):  # these count what no zip can hold
        path = zipped(folder / "data.zip", path if path.is_dir() else data)
    return path, least, most


def zipped(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name.isprintable():
                file.write(path, f"all/{path.relative_to(folder).as_posix()}")
    return archive


def with_stray_quote(draw: random.Random, data: bytes) -> bytes:
    """Where a cell begins: the records behind it may be taken for a part of it."""
    starts = [at for at, byte in enumerate(data, start=1) if byte in b",\t\n"]
    at = draw.choice(starts)
    return data[:at] + b'"' + data[at:]


def rows_left(container: str, before: bytes, after: bytes, first: int, rows: int) -> int:
    """The least number of rows of a container that was damaged, from byte `first` on.

    All of them where a row is a line, a record, an image with its caption, or counted in a footer. Not so where the
    damage decides where rows begin: what is behind it in a JSON list or a tar is told in one bad row.
    """
    if container == "token":
        return len([line for line in after.split(b"\n") if line.decode("utf-8-sig", "replace").strip()])
    if container in ("by name", "arrow"):
        return 1
    if container in LINES:
        return len([line for line in after.split(b"\n") if line.strip()])
    if container in ("csv", "tsv", "metadata.csv"):
        return csv_rows(after.decode("utf-8-sig", "surrogateescape"))
    if container in ("sidecar", "classes", "full names", "twins") or before.startswith(b'{"annotations"'):
        return rows
    if container in ("json", "label studio"):
        return max(1, before[:first].count(b"\n") - 1)
    if container == "tar":
        with tarfile.open(fileobj=io.BytesIO(before)) as tar:
            members = tar.getmembers()
        ends = [member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for member in members]
        return max(1, sum(end <= first for end in ends[1::2]))  # a picture and its text are a row
    if container in ("coco", "vqav2"):
        try:
            found = json.loads(after.decode("utf-8-sig", "surrogateescape"))
            return len(found["annotations" if container == "coco" else "questions"])
        except (ValueError, LookupError, TypeError, RecursionError):
            return 1
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.ParquetFile(io.BytesIO(after)).metadata
    except (pa.ArrowException, OSError, ValueError):
        return 1
    groups = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return min(len(after), sum(max(0, number) for number in groups))  # a damaged one may tell of any number


def csv_rows(text: str) -> int:
    """From each line the shortest run of lines that is one record as long as the header; or that line alone, bad."""
    lines = list(io.StringIO(text, newline=""))
    mark = max(",;\t|", key=(lines or [""])[0].count)

    def record(start: int) -> tuple[int, int]:
        """Lines and cells of the record that begins here; (1, -1) where there is none."""
        for end in range(start + 1, len(lines) + 1):
            try:
                found = list(csv.reader(lines[start:end], delimiter=mark, strict=True))
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # a quote is open yet
                    continue
                break
            return end - start, len(found[0])
        return 1, -1

    at, cells = record(0) if lines else (0, 0)
    rows = 0
    while at < len(lines):
        length, found = record(at)
        at += length if found in (0, cells) else 1
        rows += found != 0  # a blank line is no row
    return rows


def text_row(row: dict) -> dict:
    return {key: row[key] for key in ("image", "caption", *EXTRA) if key in row}


def write_jsonl(draw, data, rows, container):
    rows = [text_row(row) for row in rows]
    if container == "messages":
        rows = [chat(row, "messages", ("role", "content"), ("user", "assistant")) for row in rows]
    if container == "conversations":
        rows = [chat(row, "conversations", ("from", "value"), ("human", "gpt")) for row in rows]
    file = data / (container if container == "metadata.jsonl" else "rows.jsonl")
    if container == "metadata.jsonl":
        rows = [{"file_name" if key == "image" else key: value for key, value in row.items()} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = sum(len(value) for row in rows for value in row.values() if isinstance(value, list)) + len(rows)
    is_folder = container == "metadata.jsonl"  # where images that no row names are bad rows too
    return (data if is_folder else file), len(rows), len(rows) + more + 8 * is_folder, [file]


def chat(row, name, keys, roles):
    texts = ("<image>What?", row.get("caption"))
    said = [dict(zip(keys, (role, text), strict=True)) for role, text in zip(roles, texts, strict=True)]
    extra = {key: row[key] for key in EXTRA if key in row}
    return {"images": [row["image"]] if "image" in row else [], name: said} | extra


def write_json(draw, data, rows, container):
    file = data / "rows.json"
    file.write_text("[\n" + ",\n".join(json.dumps(text_row(row)) for row in rows) + "\n]")
    return (
        file,
        len(rows),
        len(rows) + sum(len(r["caption"]) for r in rows if isinstance(r.get("caption"), list)),
        [file],
    )


def write_csv(draw, data, rows, container):
    file = data / (container if container == "metadata.csv" else f"rows.{container}")
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter(container))
    writer.writerow(("file_name" if container == "metadata.csv" else "image", "caption"))
    for row in rows:
        writer.writerow([row.get("image", ""), row.get("caption", "")])
    file.write_bytes(out.getvalue().encode("utf-8", "surrogatepass"))
    is_folder = container == "metadata.csv"
    return (data if is_folder else file), len(rows), len(rows) + 8 * is_folder, [file]


def delimiter(container):
    return "\t" if container == "tsv" else ","


def write_parquet(draw, data, rows, container):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = []
    for row in rows:
        name, text = row.get("image"), row.get("caption")
        picture = draw.choice(PICTURES)[1]
        if draw.random() < 0.3:
            picture, _ = damaged(draw, picture)
        path = name if isinstance(name, str) and name.isprintable() else None
        text = text if isinstance(text, str) and text.isprintable() else None
        cells.append({"image": {"bytes": draw.choice((picture, picture, b"", None)), "path": path}, "caption": text})
    file = data / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(cells), file, row_group_size=draw.randint(1, 4))
    return file, len(rows), len(rows), [file]


def write_tar(draw, data, rows, container):
    file = data / "rows.tar"
    with tarfile.open(file, "w") as tar:
        for number, row in enumerate(rows):
            suffix, picture = draw.choice(PICTURES)
            if draw.random() < 0.3:
                picture, _ = damaged(draw, picture)
            members = [(f"{number:04}.{suffix}", picture)]
            if draw.random() < 0.5:
                members.append((f"{number:04}.json", json.dumps(text_row(row)).encode()))
            else:
                members.append((f"{number:04}.txt", str(row.get("caption")).encode("utf-8", "surrogatepass")))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    more = sum(len(row["caption"]) for row in rows if isinstance(row.get("caption"), list))
    return file, len(rows), len(rows) + more, [file]


def write_coco(draw, data, rows, container):
    names = sorted({str(row.get("image")) for row in rows})
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    said = [
        {"id": number, "image_id": names.index(str(row.get("image"))), "caption": row.get("caption")}
        for number, row in enumerate(rows)
    ]
    file = data / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": said}))
    return file, len(rows), len(rows) + len(images), [file]


def write_vqav2(draw, data, rows, container):
    asked = [{"question_id": n, "image": r.get("image"), "question": r.get("question")} for n, r in enumerate(rows)]
    said = [{"question_id": n, "answers": [{"answer": r.get("caption")}]} for n, r in enumerate(rows)]
    files = [data / "x_questions.json", data / "x_annotations.json"]
    files[0].write_text(json.dumps({"questions": asked}))
    files[1].write_text(json.dumps({"annotations": said}))
    return files[0], len(rows), 2 * len(rows), files


def write_sidecar(draw, data, rows, container):
    images = [path for path in data.rglob("*.*") if path.suffix != ".txt"]
    files = []
    for path, row in zip(images, rows, strict=False):
        files.append(path.with_suffix(".txt"))
        files[-1].write_text(str(row.get("caption")), errors="surrogatepass")
    return data, len(images), len(images), files


def write_full_names(draw, data, rows, container):
    data, least, most, files = write_sidecar(draw, data, rows, container)
    moved = [file.rename(f"{image}.txt") for file, image in zip(files, images_of(data), strict=False)]
    return data, least, most, moved


def images_of(data):
    return [path for path in data.rglob("*.*") if path.suffix != ".txt"]


def pictures_in(draw, folder, rows):
    """A picture for each row, below the folder; their paths."""
    paths = []
    for number, _ in enumerate(rows):
        suffix, picture = draw.choice(PICTURES)
        paths.append(folder / draw.choice(("red fox", "cats")) / f"{number}.{suffix}")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(damaged(draw, picture)[0] if draw.random() < 0.3 else picture)
    return paths


def write_classes(draw, data, rows, container):
    paths = pictures_in(draw, data / "classes", rows)
    return data / "classes", len(paths), len(paths), paths


def write_twins(draw, data, rows, container):
    paths = pictures_in(draw, data / "both/images", rows)
    files = [data / "both/captions" / path.relative_to(data / "both/images").with_suffix(".txt") for path in paths]
    for file, row in zip(files, rows, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(row.get("caption")), errors="surrogatepass")
    return data / "both", len(paths), len(paths), files


def write_by_name(draw, data, rows, container):
    """Names may be there twice, as no dictionary has them."""
    pairs = [(row["image"], row.get("caption")) for row in rows if isinstance(row.get("image"), str)]
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(caption)}" for name, caption in pairs)
    file = data / "rows.json"
    file.write_text(f"{{{text}}}")
    more = sum(len(caption) for _, caption in pairs if isinstance(caption, list))
    return file, len(pairs), len(pairs) + more, [file]


def write_token(draw, data, rows, container):
    lines = [f"{row.get('image')}#{number}\t{row.get('caption')}\n" for number, row in enumerate(rows)]
    file = data / "rows.token"
    file.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    return file, rows_left(container, b"", file.read_bytes(), 0, len(rows)), None, [file]


def write_label_studio(draw, data, rows, container):
    tasks = []
    for row in rows:
        typed = {"type": draw.choice(("textarea",) * 4 + ("rectanglelabels",)), "from_name": "caption"}
        typed["value"] = {"text": draw.choice((row.get("caption"), [row.get("caption")]))}
        annotations = [{"result": [typed], "was_cancelled": draw.random() < 0.1}] * draw.choice((0, 1, 1, 2))
        tasks.append({"data": {"image": row.get("image")}, "annotations": annotations})
    file = data / "rows.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, tasks)) + "\n]")
    return file, len(tasks), None, [file]


def write_arrow(draw, data, rows, container):
    import datasets

    datasets.disable_progress_bars()
    cells = {"image": [], "label": [], "text": []}
    for row in rows:
        picture = draw.choice(PICTURES)[1]
        cells["image"].append({"bytes": damaged(draw, picture)[0] if draw.random() < 0.3 else picture, "path": None})
        cells["label"].append(draw.choice((0, 1, 1, -1)))
        cells["text"].append(str(row.get("image"))[:40].encode("utf-8", "replace").decode())
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    if draw.random() < 0.5:
        features["text"] = datasets.Value("string")
    else:
        del cells["text"]
    made = datasets.Dataset.from_dict(cells, features=datasets.Features(features))
    made.save_to_disk(data / "saved")
    return data / "saved", len(rows), len(rows), sorted((data / "saved").iterdir())


WRITERS = dict.fromkeys(("jsonl", "metadata.jsonl", "messages", "conversations"), write_jsonl)
WRITERS |= {"json": write_json, "csv": write_csv, "tsv": write_csv, "metadata.csv": write_csv}
WRITERS |= {"parquet": write_parquet, "tar": write_tar, "coco": write_coco, "vqav2": write_vqav2}
WRITERS |= {"sidecar": write_sidecar, "full names": write_full_names, "classes": write_classes, "twins": write_twins}
WRITERS |= {"by name": write_by_name, "token": write_token, "label studio": write_label_studio, "arrow": write_arrow}


def check(*arguments: object) -> tuple[int, str, str]:
    """Exit code, what was printed, what was said; printed to a stream of UTF-8 and nothing else, like a pipe."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    with redirect_stdout(out), redirect_stderr(err):
        code = vlm_lora(["check", *map(str, arguments)])
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def run_case(number: int) -> str:
    """Run one case; how it ended ("good", "bad rows", "refused"). Raises where something that must hold does not."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        path, least, most = make_case(draw, folder)
        extra = ["--html", folder / "x.html", "--write-clean", folder / "clean"] if draw.random() < 0.3 else []
        os.environ["VLM_LORA_CACHE"] = str(folder / "cache")
        rows = written_rows(path)
        files = [file for file in (folder / "data").rglob("*") if file.is_file() and not file.is_symlink()]
        has_parts = any(b'"split"' in file.read_bytes() for file in files)
        if draw.random() < 0.15 and not has_parts:  # against itself: all of it twice
            extra, least, most = [*extra, "--val", path], 2 * least, most and 2 * most
        code, out, err = check(path, "--json", *extra)
        if code and not out:
            last = err.strip().splitlines()[-1]
            assert code == 1, f"exit code {code}: {err}"
            assert last.startswith("vlm-lora: "), f"refused without a reason: {err!r}"
            return "refused"
        facts = json.loads(out)
        accounted = facts["answers"] + facts["held_out"]["answers"] + len(facts["bad"])
        assert least <= accounted <= (most or accounted), f"{accounted} rows, expected {least} to {most}: {facts}"
        assert code == bool(facts["bad"]), f"exit code {code}: {facts}"
        assert all(row["reason"] and "\n" not in row["reason"] for row in facts["bad"]), facts
        check_fields(rows, facts)
        if "--write-clean" in extra and facts["answers"]:
            code, out, err = check(folder / "clean", "--json")
            again = json.loads(out)
            assert code == 0, f"the clean copy is not clean: {again['bad']}"
            assert again["answers"] == facts["answers"], "the clean copy has other answers"
            assert again["cleaning"] == {"texts": 0}, again["cleaning"]
        return "bad rows" if facts["bad"] else "good"


def written_rows(path: Path) -> dict[int, dict]:
    """The rows of a file of lines that can be read, by their line."""
    rows = {}
    if path.suffix == ".jsonl":
        for line, data in enumerate(path.read_bytes().split(b"\n"), start=1):
            with suppress(ValueError, RecursionError):
                row = json.loads(data)
                rows |= {line: row} if isinstance(row, dict) else {}
    return rows


def check_fields(rows: dict[int, dict], facts: dict) -> None:
    """Every field has its effect, or is named as unused, or its row is bad."""
    bad = {row["line"] for row in facts["bad"]}
    for line, row in rows.items():
        left = {name for name, value in row.items() if name not in USED and value not in (None, "", [], {})}
        lost = left - facts.get("unused", {}).keys()
        assert line in bad or not lost, f"line {line}: nothing tells what became of {lost}: {facts}"
    objects = [row["objects"] for line, row in rows.items() if line not in bad and row.get("objects")]
    boxes = sum(len(each["bbox"]) for each in objects)
    read = facts.get("boxes", {}).get("read", 0)
    assert boxes <= read, f"{boxes} boxes in rows that are good, and {read} were read: {facts}"


def work(first: int, until: float, current, ended, findings) -> None:
    number = first
    while time.time() < until:
        current.value = number
        try:
            ended[("good", "bad rows", "refused").index(run_case(number))] += 1
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            assert used < MEMORY, f"{used:,} bytes of memory"
        except Exception as error:
            findings.put((number, f"{type(error).__name__}: {error}"[:2000], traceback.format_exc()[-4000:]))
        number += 1
    current.value = number


def run(seconds: float, first: int) -> dict:
    """Cases for so long; a record of them. A hang or a crash is a finding, and the next case goes on."""
    context = multiprocessing.get_context("spawn")
    current, ended = context.Value("q", first), context.Array("q", 3)
    until, found = time.time() + seconds, []
    while time.time() < until:
        findings = context.SimpleQueue()
        process = context.Process(target=work, args=(current.value, until, current, ended, findings))
        process.start()
        last, since = current.value, time.time()
        while process.is_alive():
            process.join(1)
            while not findings.empty():
                number, reason, where = findings.get()
                found.append({"case": number, "reason": reason})
                print(f"case {number}: {reason}\n{where}", file=sys.stderr, flush=True)
            if current.value != last:
                last, since = current.value, time.time()
            elif time.time() - since > SECONDS_A_CASE:
                process.kill()
                process.join()
        while not findings.empty():
            number, reason, _ = findings.get()
            found.append({"case": number, "reason": reason})
        if process.exitcode:
            how = "hang" if time.time() - since > SECONDS_A_CASE else f"crash (exit code {process.exitcode})"
            found.append({"case": current.value, "reason": how})
            print(f"case {current.value}: {how}", file=sys.stderr, flush=True)
            current.value += 1
    return {
        "cases": current.value - first,
        "ended": dict(zip(("good", "bad rows", "refused"), ended, strict=True)),
        "findings": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--only", type=int, metavar="N", help="run one case, here, and say how it ended")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the record to the runs there")
    options = parser.parse_args()
    if options.only is not None:
        print(run_case(options.only))
        return 0
    started = time.time()
    record = {
        "command": f"python -m tests.data.fuzz --minutes {options.minutes:g} --first {options.first}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"vlm-lora": __version__, "pillow": PIL.__version__, "python": platform.python_version()},
    } | run(60 * options.minutes, options.first)
    record["minutes"] = round((time.time() - started) / 60, 1)
    if options.record:
        kept = json.loads(options.record.read_text()) if options.record.exists() else {"runs": []}
        kept["runs"].append(record)
        options.record.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if record["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
