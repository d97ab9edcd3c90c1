"""Flags from the table of knobs: all of them in groups, or those that a command shares with a run."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm_lora.config import DTYPES, GROUPS, KNOBS, Knob, TrainConfig, config_from, flag_of, inherited, read_yaml
from vlm_lora.errors import ConfigError

READING = tuple(each.name for each in KNOBS.values() if each.reads)
"""How data is read, for commands that read some."""


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(KNOBS)) -> None:
    """A flag for each of these knobs, under the headings of its group. One that is not given is not in the options."""
    for title in GROUPS:
        if knobs := [each for each in KNOBS.values() if each.group == title and each.name in names]:
            group = parser.add_argument_group(title)
            for each in knobs:
                _add(group, each)


def add_config(parser: argparse.ArgumentParser) -> None:
    """All knobs, and --config."""
    add_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, named as the flags")


def _add(group: argparse._ArgumentGroup, knob: Knob) -> None:
    shown = "" if knob.default in (None, "") or knob.kind is bool else f" (default: {knob.default})"
    text = (knob.help + shown).replace("%", "%%")
    if knob.name == "data":
        group.add_argument("data", nargs="*", metavar="DATA", help=text)
        return
    extra: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if knob.kind is not bool:
        extra = {"type": knob.kind, "metavar": {str: "TEXT", int: "N", float: "X"}[knob.kind]}
    if knob.choices:
        extra |= {"choices": knob.choices, "metavar": "|".join(knob.choices)}
    group.add_argument(knob.flag, dest=knob.name, default=argparse.SUPPRESS, help=text, **extra)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The knobs that the command line names, and their values."""
    return {name: value for name, value in vars(options).items() if name in KNOBS and value not in (None, [])}


def add_server(parser: argparse.ArgumentParser, help: str) -> None:
    """The flags of a command that may ask a server in the place of a model."""
    parser.add_argument("--endpoint", metavar="URL", help=help)
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at a time to --endpoint (default: 16)"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that answers with a model, about the numbers it is kept in."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="keep the base's language layers in NF4, a quarter of their memory; costs a little of what was learnt, "
        "which eval measures",
    )


def config_of(options: argparse.Namespace) -> TrainConfig:
    """What --config and the flags say, the flags first."""
    file = getattr(options, "config", None)
    source = str(file or f"vlm-lora {options.verb}")
    settings = read_yaml(file) if file else {}
    if flags := [name for name in settings if name in vars(options) and name not in KNOBS]:
        raise ConfigError(
            f"{file}: {flags[0]!r} is a flag of the command, and no setting of a run file. Give it there: "
            f"vlm-lora {options.verb} --config {file} {flag_of(flags[0])}"
        )
    return config_from(inherited(settings | given(options), source), source)
