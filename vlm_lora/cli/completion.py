"""Print a script that completes commands, flags and file names in your shell.

vlm-lora completion bash > ~/.local/share/bash-completion/completions/vlm-lora
vlm-lora completion zsh > ~/.zfunc/_vlm-lora       where ~/.zfunc is in your fpath
"""

import argparse

from vlm_lora.cli.parser import Parser

FILES = ("DATA", "FILE", "FOLDER", "OUT", "PATH", "RUN")
"""What flags and operands are called that take the name of a file or folder."""
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="|".join(SHELLS), choices=SHELLS, help="your shell")


def run(options: argparse.Namespace) -> int:
    import shtab  # pyright: ignore[reportMissingImports]  # where an environment is older than the dependency

    program: Parser = options.program
    for parser in (program, *program.verbs.values()):
        for action in parser._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]  # where shtab looks for it
    print(shtab.complete(program, shell=options.shell))
    return 0
