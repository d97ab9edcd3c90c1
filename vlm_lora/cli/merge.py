"""Make an adapter part of its base: a plain checkpoint that vLLM, SGLang and transformers load as they load the base.

For LoRA and QLoRA; the other methods add to the model and cannot be merged. Before the checkpoint is there, its logits
and captions are compared with the adapter's.

  vlm-lora merge runs/photos merged
  vlm-lora merge runs/photos merged --images photos/cat.jpg photos/dog.jpg
  vlm-lora merge runs/photos merged --gguf                            and as the two files of llama.cpp and Ollama
  vlm-lora merge runs/photos merged --push me/photos-model            and upload it, to a private repository
"""

import argparse
from pathlib import Path

from vlm_lora.cli.push import upload
from vlm_lora.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="RUN", help="run folder or adapter folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="number format to write (default: that of the base's files)"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="images to compare on (default: coloured noise)"
    )
    parser.add_argument(
        "--gguf", action="store_true", help="also write it in F16 for llama.cpp, whose converter has to be on the PATH"
    )
    parser.add_argument("--push", metavar="REPO", help="then upload it to the model hub as owner/name, private")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.inference.export import merge
    from vlm_lora.inference.gguf import find_converter, to_gguf

    converter = find_converter() if options.gguf else None  # before the work, not after it
    merged = merge(
        options.adapter, options.output, model=options.model, dtype=options.dtype, images=options.images, report=say
    )
    alike = sum(tuned == again for tuned, again in merged.captions)
    say(
        f"The adapter moves the logits by {100 * merged.effect:.3g} %; those of the merged model, in {merged.dtype}, "
        f"are {100 * merged.error:.3g} % away from its own. {alike} of {len(merged.captions)} captions are the same."
    )
    if merged.dequantised:
        say("The base is the one in four bits, written out: the adapter was trained on it.")
    print(merged.folder)
    if converter:
        say(f"Writing it for llama.cpp, by {converter}.")
        gguf = to_gguf(merged.folder, converter)
        print(gguf.model, gguf.tower, sep="\n")
        say(f"Serve it, in the pixel limits it was trained with, by: {gguf.command}")
    if options.push:
        upload(str(merged.folder), options.push)
    return 0
