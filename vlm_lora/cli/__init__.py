"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done in part, 128 and the signal's number when stopped by one.
"""

import os
import sys
import time
from collections.abc import Sequence

from vlm_lora import __version__
from vlm_lora.cli import cache, caption, check, completion, demo, doctor, evaluate, merge, plan, push, train
from vlm_lora.cli.parser import Parser
from vlm_lora.console import launched, one_line, process_index, to_stderr
from vlm_lora.errors import ConfigError, Stopped, VlmLoraError

VERBS = (train, caption, evaluate, check, plan, merge, push, demo, cache, doctor, completion)

SHARED = ("train", "caption", "eval")
"""What several processes of a launcher do together."""

DESCRIPTION = """\
Teach a Qwen-VL vision-language model your own pictures.

  vlm-lora check ./photos                               what is in a folder of images and captions
  vlm-lora train ./photos --output runs/photos          learn from it
  vlm-lora caption ./more --adapter runs/photos         caption other images with what was learnt
  vlm-lora demo --adapter runs/photos                   see base and tuned side by side in the browser
"""


def command_line() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="vlm-lora", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"vlm-lora {__version__}", help="show the version")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands", parser_class=Parser)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2].replace("evaluate", "eval")
        summary, _, _ = (verb.__doc__ or "").partition("\n")
        sub = verbs.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=verb.__doc__,
            everyday=getattr(verb, "EVERYDAY", ()),
        )
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run, parser=sub, program=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``VLM_LORA_TRACEBACK=1`` shows where an error came from."""
    parser = command_line()
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            getattr(options, "parser", parser).refuse(unknown)
        if options.verb is None:
            to_stderr(parser.format_help(), end="")
            return 2
        if launched() and options.verb not in SHARED:
            raise ConfigError(
                f"{options.verb} runs in one process, only {', '.join(SHARED)} in several. Leave the launcher out."
            )
        return options.run(options)
    except VlmLoraError as error:
        if os.environ.get("VLM_LORA_TRACEBACK"):
            raise
        if process_index() > 0:
            time.sleep(3)  # the main process most often says the same, and the launcher then ends this one
        if process_index() == 0 or not isinstance(error, Stopped):
            to_stderr(f"vlm-lora: {one_line(str(error))}")
        if isinstance(error, Stopped):
            return error.exit_code
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        to_stderr("vlm-lora: stopped. What was written is kept; run the same command again (train: with --resume).")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
