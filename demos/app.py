"""The demo as a program, for hosting: python demos/app.py --adapter runs/photos --host 0.0.0.0

It takes what `vlm-lora demo` takes. User and password come from the environment, VLM_LORA_DEMO_AUTH=user:password,
where no list of processes shows them; without them the demo stays on this machine.
"""

import sys

from vlm_lora.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
