"""Build the tokenizer of the embedded model: a true prefix of Qwen2's vocabulary.

    pip install dashscope==2.0.2        # Apache-2.0; carries Qwen's published BPE ranks
    python data/tiny/build_tokenizer.py OUT [--size 4096]

The first ``--size`` token ids and the merges that make them are those of Qwen2-VL; its 14 special tokens follow
directly behind them. ``--size 151643`` gives the whole Qwen2-VL tokenizer (151,657 tokens, ids as published), which the
tests use. Lossless on any text, since the 256 byte tokens come first.
"""

import argparse
import base64
import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

FULL_SIZE = 151_643

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# Qwen2-VL's chat format: a default system turn, `<|im_start|>role\n...<|im_end|>\n` turns, and one placeholder an image.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes, which byte-level BPE files are written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two pieces a token was merged from: BPE on its bytes with only the merges ranked below it."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        candidates = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(pairwise(pieces))
            if ranks.get(left + right, len(ranks)) < ranks[token]
        ]
        _, i = min(candidates)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def build_tokenizer(size: int):
    """A `Qwen2Tokenizer` of the first ``size`` Qwen2 tokens and the 14 special ones."""
    from tokenizers import Tokenizer
    from transformers import Qwen2Tokenizer

    lines = files("dashscope").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    alphabet = byte_alphabet()
    kept = [token for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank < size]

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {spell(token): ranks[token] for token in kept}
    merges = [tuple(map(spell, halves(token, ranks))) for token in kept if len(token) > 1]
    seed = Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None)
    state = json.loads(seed.backend_tokenizer.to_str())
    # The constructor numbers special tokens in an order of its own; Qwen2's order is fixed.
    state["added_tokens"] = [
        {"id": size + i, "content": token, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]  # fmt: skip
    return Qwen2Tokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=32_768,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=4096, help=f"ordinary tokens to keep, up to {FULL_SIZE}")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.size)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens in {args.out}")


if __name__ == "__main__":
    main()
