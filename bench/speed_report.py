"""The record of `bench.speed` as numbers, as Markdown and as drawings."""

import statistics
from html import escape
from pathlib import Path

from bench.speed import COLD, EPOCHS, OURS, TARGETS, TECHNIQUES

NAMES = {"plain": "plain loop", "trl": "TRL", "llamafactory": "LLaMA-Factory", "swift": "ms-swift"}
MB = 1e6


def medians(record: dict, suite: str) -> dict[str, dict[str, dict]]:
    """Workload to method to the medians of its runs; seconds, bytes. What a method cannot tell is left out."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in record["runs"]:
        if run["suite"] == suite:
            groups.setdefault((f"{run['workload']}, {run['answers']} answers", run["method"]), []).append(run)
    rows: dict[str, dict[str, dict]] = {}
    for (workload, method), runs in groups.items():
        epochs = EPOCHS if method == COLD else 1

        def middle(value, runs=runs) -> float:
            return statistics.median(value(run) for run in runs)

        row = {
            "runs": len(runs),
            "epoch": middle(lambda run: run["steps"][-1]) / epochs,
            "prepare": middle(lambda run: run["prepare"]),
            "whole": middle(lambda run, times=EPOCHS // epochs: run["prepare"] + times * run["steps"][-1]),
            "startup": middle(lambda run: run["startup"]),
            "process_cpu": middle(lambda run: run["process_cpu"]),
            "process_peak": middle(lambda run: run["process_peak_bytes"]),
        }
        if "peak_bytes" in runs[0]:
            row["peak"] = middle(lambda run: run["peak_bytes"] - run["base_bytes"])
        if "cpu" in runs[0]:
            # By the processor's own clock, which other programs on the machine disturb less.
            row["cpu"] = middle(lambda run: run["cpu"])
            row["busy"] = min(run["cpu"] / (run["prepare"] + run["steps"][-1]) for run in runs)
        rows.setdefault(workload, {})[method] = row
    return rows


def summary(record: dict) -> dict:
    """How many times faster than the best of the others, and the targets: by workload of the main suite."""
    found = {}
    for workload, methods in medians(record, "main").items():
        others = {name: row for name, row in methods.items() if not name.startswith(OURS)}
        if not others or OURS not in methods or COLD not in methods:
            continue
        ratios = {
            "epoch": min(row["epoch"] for row in others.values()) / methods[OURS]["epoch"],
            "whole": min(row["whole"] for row in others.values()) / methods[COLD]["whole"],
            "memory": max(methods[OURS]["peak"], methods[COLD]["peak"])
            / min(row["peak"] for row in others.values() if "peak" in row),
        }
        row = {name: round(value, 3) for name, value in ratios.items()}
        wanted = TARGETS.get(workload.rpartition(",")[0])
        if wanted:
            good = (ratios["epoch"] >= wanted[0], ratios["whole"] >= wanted[1], ratios["memory"] <= wanted[2])
            row["targets"] = dict(zip(ratios, wanted, strict=True))
            row["met"] = dict(zip(ratios, good, strict=True))
        model = record["predicted"].get(workload)
        if model:  # of what the operation count promises against the plain loop, what was measured against the best
            row["of_model"] = {name: round(ratios[name] / promised, 2) for name, promised in model.items()}
        row["least_busy"] = round(min(row["busy"] for row in methods.values() if "busy" in row), 2)
        found[workload] = row
    return found


def table(record: dict) -> str:
    """All suites as Markdown."""
    parts = [f"{record['machine']}; {record['settings']['dtype']}; medians."]
    headline = summary(record)
    if headline:
        lines = ["| workload | an epoch, full cache | 3 epochs, filling included | peak memory |", "|---|---|---|---|"]
        for workload, row in headline.items():
            cells = []
            for name in ("epoch", "whole", "memory"):
                cell = f"{row[name]:.2f}x"
                if "met" in row:
                    bound = "at most" if name == "memory" else "at least"
                    cell += f" ({bound} {row['targets'][name]:g}x: {'met' if row['met'][name] else '**not met**'})"
                if name in row.get("of_model", {}):
                    cell += f", {100 * row['of_model'][name]:.0f} % of the cost model's"
                cells.append(cell)
            lines.append(f"| {workload} | {' | '.join(cells)} |")
        parts.append("vlm-lora against the best of the others:\n\n" + "\n".join(lines))
        least = min(row["least_busy"] for row in headline.values())
        if least < 0.95:
            parts.append(f"Disturbed: in one run other programs left only {100 * least:.0f} % of the core.")
    for suite in dict.fromkeys(run["suite"] for run in record["runs"]):
        lines = [
            f"Suite {suite}:\n\n| workload | tool | runs | epoch, s | the plain loop's | whole, s "
            "| start-up, s | memory of a step, MB | process, MB | CPU, s |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for workload, methods in medians(record, suite).items():
            for method, row in methods.items():
                peak = f"{row['peak'] / MB:,.0f}" if "peak" in row else ""
                # Left out techniques prepare what they never use, so only their steps mean something.
                ratio = f"{methods['plain']['epoch'] / row['epoch']:.2f}x" if "plain" in methods else ""
                whole = "" if method in TECHNIQUES else f"{row['whole']:.1f}"
                lines.append(
                    f"| {workload} | {NAMES.get(method, method)} | {row['runs']} | {row['epoch']:.2f} | {ratio} "
                    f"| {whole} | {row['startup']:.1f} | {peak} | {row['process_peak'] / MB:,.0f} "
                    f"| {row['process_cpu']:.0f} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ---- drawings ----------------------------------------------------------------------------------------------------


def plots(record: dict, folder: Path) -> list[Path]:
    """How cost grows, one drawing: with answers per image, image tokens, epochs and data; as far as it was run."""
    main, growth = medians(record, "main"), medians(record, "growth")

    def lines(groups: dict, place) -> dict[str, list[tuple[float, float]]]:
        """Per tool (x, seconds of three epochs and all before them); ``place`` gives x of a workload, or None."""
        found: dict[str, list] = {"plain loop": [], "vlm-lora": []}
        for workload, methods in groups.items():
            said, tokens, answers = (int(part.split()[0]) for part in workload.split(", "))
            x = place(said, tokens, answers)
            if x is not None and "plain" in methods and COLD in methods:
                found["plain loop"].append((x, methods["plain"]["whole"]))
                found["vlm-lora"].append((x, methods[COLD]["whole"]))
        return {name: sorted(points) for name, points in found.items()}

    def per_epoch(methods: dict) -> dict[str, list[tuple[float, float]]]:
        plain, ours = methods["plain"], methods[COLD]
        return {
            "plain loop": [(e, e * plain["epoch"]) for e in range(EPOCHS + 1)],
            "vlm-lora": [(e, ours["prepare"] + e * ours["epoch"]) for e in range(EPOCHS + 1)],
        }

    panels = []
    if main:
        by_said = lines(main, lambda said, tokens, answers: said if tokens == 256 else None)
        panels.append(("answers per image (the same number of answers)", by_said))
        five = next((m for w, m in main.items() if w.startswith("5 ") and "plain" in m and COLD in m), None)
        if five:
            panels.append(("epochs done (5 captions, 256 tokens)", per_epoch(five)))
    if growth:
        least = min(int(workload.split(", ")[2].split()[0]) for workload in growth)
        of_large_images = medians(record, "techniques")
        by_tokens = lines(growth | of_large_images, lambda said, tokens, answers: tokens if answers == least else None)
        panels.append(("image tokens (5 captions an image)", by_tokens))
        panels.append(("answers in the data (5 captions, 64 tokens)",
                       lines(growth, lambda said, tokens, answers: answers if tokens == 64 else None)))  # fmt: skip
    panels = [(label, series) for label, series in panels if all(len(points) > 1 for points in series.values())]
    if not panels:
        return []
    path = folder / "speed.svg"
    path.write_text(draw(panels), encoding="utf-8")
    return [path]


COLOURS = {"plain loop": "#b0483a", "vlm-lora": "#1f6f8b"}
WIDE, HIGH, LEFT, TOP = 320, 230, 46, 34


def draw(panels: list[tuple[str, dict[str, list[tuple[float, float]]]]]) -> str:
    """Line charts side by side, two a row; y is seconds of training."""
    columns = min(2, len(panels))
    width, height = columns * WIDE, -(-len(panels) // columns) * HIGH
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (label, series) in enumerate(panels):
        x0, y0 = WIDE * (number % columns) + LEFT, HIGH * (number // columns) + TOP
        w, h = WIDE - LEFT - 24, HIGH - TOP - 44
        most_x = max(x for points in series.values() for x, _ in points)
        most_y = max(y for points in series.values() for _, y in points)
        out.append(f'<path d="M{x0} {y0}v{h}h{w}" fill="none" stroke="#888"/>')
        out.append(f'<text x="{x0 + w / 2}" y="{y0 + h + 32}" text-anchor="middle">{escape(label)}</text>')
        out.append(f'<text x="{x0 - 6}" y="{y0 + 4}" text-anchor="end">{most_y:.0f} s</text>')
        out.append(f'<text x="{x0 - 6}" y="{y0 + h + 4}" text-anchor="end">0</text>')
        for x in sorted({x for points in series.values() for x, _ in points}):
            out.append(f'<text x="{x0 + w * x / most_x:.1f}" y="{y0 + h + 16}" text-anchor="middle">{x:g}</text>')
        for at, (name, points) in enumerate(series.items()):
            places = [(x0 + w * x / most_x, y0 + h - h * y / most_y) for x, y in points]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            colour = COLOURS[name]
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
            out.append(f'<text x="{x0 + 8 + 90 * at}" y="{y0 - 14}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
