"""The parser of the command line: help with the everyday flags first, and errors that name the nearest real flag."""

import argparse
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from vlm_lora.config import KNOBS, nearest
from vlm_lora.console import to_stderr
from vlm_lora.errors import ConfigError

WIDTH = 100
"""Columns of help, where the terminal has as many."""


class Parser(argparse.ArgumentParser):
    """The parser of one command. ``everyday`` names what ``--help`` shows; ``--help-all`` shows every flag.

    Wrong usage raises ConfigError, in one line, with the command's own usage.
    """

    def __init__(self, *, everyday: Collection[str] = (), **settings):
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=_Formatter, **settings)
        self._positionals.title = "arguments"
        self.everyday = frozenset(everyday)
        self.add_argument("-h", "--help", action=_Help, help="show this help")
        if everyday:
            self.add_argument("--help-all", action=_Help, help="show every flag")

    def format_usage(self) -> str:
        return f"usage: {self.prog} {self._operands()}\n"

    def format_help(self, whole: bool = False) -> str:
        """The help text: operands, then flags by group. Without ``whole`` only the everyday ones."""
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} {self._operands()}", [], [], prefix="usage: ")
        formatter.add_text(self.description)
        operands, plain, *groups = self._action_groups
        for group in (operands, *groups, plain):
            shown = [a for a in group._group_actions if whole or not self.everyday or self._is_everyday(a)]
            formatter.start_section(group.title)
            formatter.add_arguments(shown)
            formatter.end_section()
        hidden = [a for a in self._actions if self.everyday and not self._is_everyday(a)]
        if hidden and not whole:
            formatter.add_text(f"{len(hidden)} more flags: {self.prog} --help-all")
        return formatter.format_help()

    def _is_everyday(self, action: argparse.Action) -> bool:
        return not action.option_strings or action.dest in self.everyday or isinstance(action, _Help)

    def _operands(self) -> str:
        names = [f"{a.metavar} ..." if a.nargs in ("*", "+") else str(a.metavar) for a in self._positionals_here()]
        return " ".join([*names, "[flags]"])

    def _positionals_here(self) -> Iterable[argparse.Action]:
        return (action for action in self._actions if not action.option_strings)

    @property
    def verbs(self) -> dict[str, "Parser"]:
        """The parsers of the commands, by name."""
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else {}

    @property
    def flags(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        to_stderr(self.format_usage(), end="")
        verb = self.prog.partition(" ")[2]
        raise ConfigError(
            f"{verb and verb + ': '}{message}{'' if message.endswith(('.', '?')) else '.'} See {self.prog} --help."
        )

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = get_close_matches(value, action.choices, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(action.choices)}."
            self.error(f"there is no command {value!r}. {hint}")
        super()._check_value(action, value)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raises ConfigError for words that no flag or operand takes."""
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-") and len(word) > 1), None)
        if flag is None:
            self.error(f"{' '.join(unknown)!r} is one too many.")
        self.error(f"there is no flag {flag}.{self._hint(flag)}")

    def _hint(self, flag: str) -> str:
        name = nearest(flag.lstrip("-").replace("-", "_"))
        if name == "data":
            return f" The data is given without a flag: {self.prog} DATA."
        if name and KNOBS[name].flag == flag:
            return " It belongs to vlm-lora train."
        near = [KNOBS[name].flag] if name and KNOBS[name].flag in self.flags else get_close_matches(flag, self.flags)
        return f" Did you mean {near[0]}?" if near else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)
        self._width = min(self._width, WIDTH)


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help(whole=option_string == "--help-all"), end="")
        parser.exit()
