"""Command lines from dataclasses: each field of a dataclass of settings is a flag.

    @dataclass
    class Settings:
        steps: int | None = flag(None, "optimiser steps", "max_iters", low=1)

    settings, given = parse_settings(Settings, ["--max-iters", "5"], "what the script does")
"""
import argparse
import dataclasses
import difflib
import math
import re
import sys
import typing
from pathlib import Path

from tokenizer import read_json


def flag(default, meaning: str, *aliases: str, **limits):
    """A field of the settings: its default, its meaning in --help, other names, and its limits:
    low and high (inclusive), above (exclusive), choices; task, the only one that it belongs to."""
    made = {"default_factory": list} if default == [] else {"default": default}
    return dataclasses.field(metadata={"help": meaning, "aliases": aliases, **limits}, **made)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest flag."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.5)
            message = f"unknown flag {unknown[1]}" + (f": did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def number(kind: type, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: an int or a float within limits."""
    def convert(word: str):
        value = kind(word)
        for wrong, limit in ((not math.isfinite(value), "finite"), (value < low, f"at least {low}"),
                             (value > high, f"at most {high}"),
                             (value <= above, f"more than {above}")):
            if wrong:
                raise argparse.ArgumentTypeError(f"{word} must be {limit}")
        return value
    convert.__name__ = kind.__name__         # argparse says "invalid int value"
    return convert


def add_flag(parser: Parser, spec: dataclasses.Field) -> None:
    """The flag of a field: --name and its aliases."""
    names = ["--" + name.replace("_", "-") for name in (spec.name, *spec.metadata["aliases"])]
    about, kinds = spec.metadata, typing.get_args(spec.type) or (spec.type,)
    limits = {name: about[name] for name in ("low", "high", "above") if name in about}
    shape = {"type": str, "metavar": "TEXT"}
    if spec.type is bool:
        shape = {"action": "store_true"}
    elif typing.get_origin(spec.type) is list:
        shape = {"nargs": "+", "metavar": "TEXT"}
    elif "choices" in about:
        shape = {"choices": about["choices"], "metavar": "|".join(about["choices"])}
    elif kinds[0] in (int, float):
        shape = {"type": number(kinds[0], **limits), "metavar": kinds[0].__name__.upper()}
    left_out = spec.default is None or spec.default is False or spec.default is dataclasses.MISSING
    default = "" if left_out else f" ({spec.default})"
    only = f"{about['task']}: " if "task" in about else ""
    parser.add_argument(*names, dest=spec.name, help=only + about["help"] + default, **shape)


def parse_settings(kind: type, argv: list[str], description: str):
    """The settings of a command line, and the names of those that were given there."""
    parser = Parser(description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for spec in dataclasses.fields(kind):
        add_flag(parser, spec)
    given = vars(parser.parse_args([re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), word)
                                    for word in argv]))
    stated = {}
    if "settings" in given:                  # the file as flags: checked in the same way
        try:
            if not Path(given["settings"]).is_file():
                raise FileNotFoundError(f"--settings {given['settings']}: no such file")
            stated = read_json(given["settings"])
        except (ValueError, OSError) as error:
            parser.error(str(error))
        words = []
        for name, value in stated.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            if value not in (None, False, []):
                words += ["--" + name.replace("_", "-"), *map(str, values)]
        stated = vars(parser.parse_args(words))
    return kind(**{**stated, **given}), set(given)


def show_any_text() -> None:
    """A terminal or file that cannot hold a letter gets a ? instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def complain(line: str, status: int = 2) -> int:
    """Print one line on stderr; the exit status."""
    print(line, file=sys.stderr)
    return status
