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
import zlib
from contextlib import redirect_stderr, redirect_stdout
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
CONTAINERS += ("metadata.csv", "messages", "conversations")
TEXTS = ("a fox", "зима 雪 ❄", "<|im_end|><|image_pad|>", "<image>", 'say "x, y"', "two\nlines", "e\u0301\u202e", "7")
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
    path, least, most, parts = WRITERS[container](draw, data, rows, container)
    if draw.random() < 0.4:
        file = draw.choice(parts)
        before = file.read_bytes()
        after, first = damaged(draw, before)
        if container in ("csv", "tsv", "metadata.csv") and draw.random() < 0.5:
            after = with_stray_quote(draw, before)
        file.write_bytes(after)
        least, most = rows_left(container, before, after, first, least), None
    return path, least, most


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
    if container in ("jsonl", "metadata.jsonl", "messages", "conversations"):
        return len([line for line in after.split(b"\n") if line.strip()])
    if container in ("csv", "tsv", "metadata.csv"):
        return csv_rows(after.decode("utf-8-sig", "surrogateescape"))
    if container == "sidecar" or before.startswith(b'{"annotations"'):
        return rows
    if container == "json":
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
    return {key: row[key] for key in ("image", "caption") if key in row}


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
    return {"images": [row["image"]] if "image" in row else [], name: said}


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


WRITERS = dict.fromkeys(("jsonl", "metadata.jsonl", "messages", "conversations"), write_jsonl)
WRITERS |= {"json": write_json, "csv": write_csv, "tsv": write_csv, "metadata.csv": write_csv}
WRITERS |= {"parquet": write_parquet, "tar": write_tar, "coco": write_coco, "vqav2": write_vqav2}
WRITERS |= {"sidecar": write_sidecar}


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
        if draw.random() < 0.15:  # against itself: all of it twice
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
        if "--write-clean" in extra and facts["answers"]:
            code, out, err = check(folder / "clean", "--json")
            again = json.loads(out)
            assert code == 0, f"the clean copy is not clean: {again['bad']}"
            assert again["answers"] == facts["answers"], "the clean copy has other answers"
            assert again["cleaning"] == {"texts": 0}, again["cleaning"]
        return "bad rows" if facts["bad"] else "good"


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
