"""Draws docs/mask.svg, from the mask and positions that `vlm_lora.model.packing` makes, and docs/forks.svg.

python docs/pictures.py
"""

from pathlib import Path

import torch

from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, pack

ROOT = Path(__file__).resolve().parents[1]
CELL = 30
STYLE = (
    "text{font:13px sans-serif;fill:#333;text-anchor:middle}.left{text-anchor:start}.small{font-size:11px;fill:#777}"
    ".p{fill:#8aa0c0}.a{fill:#7fb08a}.b{fill:#d9a05b}.no{fill:#f2f2f2}"
)
TOKENS = ["image", "image", "image", "a1", "a2", "b1", "b2", "b3"]
"""A picture of three tokens, and two answers about it."""


def svg(width: int, height: int, body: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join(
        [head, f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>"]
    )


def branch(length: int) -> Branch:
    ids = torch.arange(length)
    return Branch(ids, torch.where(ids == 0, IGNORE_INDEX, ids))


def mask() -> str:
    """Who sees whom in a packed row, and each token's position."""
    prefix = torch.arange(3)
    packed = pack([[Encoded(prefix, prefix.expand(3, -1), (branch(2), branch(3)))]], pad_token_id=0)
    seen, positions = packed.attention_mask[0, 0], packed.position_ids[0, 0]
    body, left, top = [], 90, 46
    for j, name in enumerate(TOKENS):
        body.append(
            f'<text x="{left + j * CELL + CELL // 2}" y="{top - 8}" class="small">{name.replace("image", "img")}</text>'
        )
    for i, name in enumerate(TOKENS):
        y = top + i * CELL
        body.append(f'<text x="{left - 40}" y="{y + 20}">{name}</text>')
        for j, other in enumerate(TOKENS):
            kind = other[0].replace("i", "p") if seen[i, j] else "no"
            body.append(
                f'<rect x="{left + j * CELL + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" class="{kind}"/>'
            )
        body.append(f'<text x="{left + 8 * CELL + 40}" y="{y + 20}">{int(positions[i])}</text>')
    body.append(f'<text x="{left + 8 * CELL + 40}" y="{top - 8}" class="small">position</text>')
    body.append(f'<text x="{left + 4 * CELL}" y="18">each row: what this token sees</text>')
    return svg(left + 8 * CELL + 90, top + 8 * CELL + 12, body)


def forks() -> str:
    """The state of linear attention: read once over the picture, then copied for every answer."""
    body = ['<defs><marker id="m" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            '<path d="M0,0 L6,3 L0,6 z" fill="#777"/></marker></defs>']  # fmt: skip

    def box(x: int, y: int, kind: str, text: str) -> None:
        body.append(f'<rect x="{x}" y="{y}" width="58" height="34" rx="5" class="{kind}"/>')
        body.append(f'<text x="{x + 29}" y="{y + 22}">{text}</text>')

    def arrow(x1: int, y1: int, x2: int, y2: int) -> None:
        body.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#777" marker-end="url(#m)"/>')

    for n in range(3):
        box(20 + 80 * n, 70, "p", "image")
        arrow(78 + 80 * n, 87, 98 + 80 * n, 87)
    body.append('<circle cx="285" cy="87" r="24" fill="#fff" stroke="#8aa0c0" stroke-width="2"/>')
    body.append('<text x="285" y="91" class="small">state</text>')
    for kind, y, count in (("a", 20, 2), ("b", 120, 3)):
        arrow(306, 75 if y < 70 else 99, 338, y + 17)
        for n in range(count):
            box(340 + 80 * n, y, kind, f"{kind}{n + 1}")
            if n:
                arrow(318 + 80 * n, y + 17, 338 + 80 * n, y + 17)
    return svg(580, 175, body)


def main() -> None:
    for name, drawn in (("mask", mask()), ("forks", forks())):
        (ROOT / f"docs/{name}.svg").write_text(drawn + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
