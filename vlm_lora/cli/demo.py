"""Open the web demo: base and tuned side by side, on this machine only.

vlm-lora demo --adapter runs/photos
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="RUN", help="run folder or adapter folder; without it the base alone")
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port on 127.0.0.1 (default: 7860)")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.demo import launch

    launch(model=options.model, adapter=options.adapter, port=options.port)
    return 0
