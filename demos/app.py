"""The demo as a program, for hosting: python demos/app.py --adapter runs/photos

User and password come from the environment, VLM_LORA_DEMO_AUTH=user:password, where no list of processes
shows them. Without them the demo stays on this machine.
"""

import argparse
import os

from vlm_lora import VlmLoraError
from vlm_lora.demo import launch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", help="run folder or adapter folder; without it the base alone")
parser.add_argument("--model", help="base model; by default the one the adapter names")
parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
parser.add_argument("--port", type=int, default=7860)
options = parser.parse_args()
user, _, password = os.environ.get("VLM_LORA_DEMO_AUTH", "").partition(":")
auth = (user, password) if password else None
try:
    launch(options.model, options.adapter, options.host, options.port, auth=auth)
except VlmLoraError as error:
    raise SystemExit(f"demo: {error}") from None
