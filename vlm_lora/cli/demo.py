"""Open the web demo: base and tuned side by side, on this machine only.

vlm-lora demo --adapter runs/photos
"""

import argparse
import os

from vlm_lora.errors import ConfigError

AUTH_VARIABLE = "VLM_LORA_DEMO_AUTH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="RUN", help="run folder or adapter folder; without it the base alone")
    parser.add_argument("--model", metavar="TEXT", help="base model (default: the one the adapter names)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on (default: 7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="TEXT", help="address to listen on (default: 127.0.0.1, this machine)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name of the demo, such as that of a proxy; may be given several times",
    )
    parser.add_argument(
        "--roots",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder below which the page may take pictures and write captions; may be given several times",
    )
    parser.add_argument(
        "--allow-training",
        action="store_true",
        help="let others train too, with --host, --share or --allowed-host; on this machine alone it is always allowed",
    )
    parser.add_argument("--share", action="store_true", help="also a public link, through gradio's servers")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="asked for on the page; needed with --host and --share. Other users of this machine can see what stands "
        f"on a command line, but not the environment variable {AUTH_VARIABLE}, which is taken too",
    )
    parser.add_argument("--no-auth", action="store_true", help="insist on --host or --share without a password")


def run(options: argparse.Namespace) -> int:
    given = options.auth or os.environ.get(AUTH_VARIABLE)
    user, _, password = (given or "").partition(":")
    if given and not (user and password):
        raise ConfigError("--auth: expected user:password, with something on both sides of the colon.")
    if given and options.no_auth:
        raise ConfigError(f"--auth (or {AUTH_VARIABLE}) and --no-auth exclude each other; leave one out.")

    from vlm_lora.demo import launch

    launch(
        options.model,
        options.adapter,
        options.host,
        options.port,
        share=options.share,
        auth=(user, password) if given else None,
        without_auth=options.no_auth,
        allowed_hosts=options.allowed_host,
        roots=options.roots,
        allow_training=options.allow_training,
    )
    return 0
