"""What entry points share: command lines of `--config FILE` and `--config.key=value`, and how a program ends."""

import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from qatmoe.config import Config, check_key, resolve
from qatmoe.errors import UserError


def run(main: Callable[[], int]) -> int:
    """Runs an entry point as a program, and returns its exit code.

    Characters that the standard output's encoding lacks are written as "?". Where its reader went away, as `head` does,
    the program ends without a word, with 141 as if SIGPIPE had ended it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return main()
        finally:  # also after the SystemExit of --help
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 128 + signal.SIGPIPE


def parse(argv: Sequence[str], usage: str, options: Mapping[str, str | bool]) -> tuple[Config, dict[str, Any]]:
    """Reads a command line.

    Args:
      argv: the program's name and its arguments.
      usage: printed by --help.
      options: further options and their defaults; one that is a bool is a switch, --name or --noname.

    Returns:
      The checked configuration and the options' values.

    Raises:
      UserError: no or a broken configuration file, an unknown flag or key, an unusable value.
    """
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", help_string="file under configs/", flag_values=values)
    found: dict[str, flags.FlagHolder] = {}
    for name, default in options.items():
        if isinstance(default, bool):
            found[name] = flags.DEFINE_boolean(name, default, "", flag_values=values)
        else:
            found[name] = flags.DEFINE_string(name, default, "", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(usage)
        raise SystemExit(0)
    given = _config_file(argv)
    if given and not Path(given.partition(":")[0]).is_file():
        raise UserError(f"--config {given}: no such file")
    for key in _overridden(argv):
        check_key(key)
    before, sys.argv = sys.argv, list(argv)  # config_flags looks for overrides there
    try:
        rest = values(list(argv))
    except flags.UnrecognizedFlagError as e:
        group = e.flagname.partition(".")[0]
        known = {field.name for field in dataclasses.fields(Config)}
        hint = f"; did you mean --config.{e.flagname}?" if group in known else ""
        raise UserError(f"{_one_line(e)}{hint}") from e
    except flags.Error as e:
        raise UserError(_one_line(e)) from e
    except (AttributeError, KeyError) as e:  # how a ConfigDict reports a phase that it does not have
        raise UserError(f"--config.train.phases.*: no such key {_one_line(e)}") from e
    except ModuleNotFoundError as e:  # a config that builds on another one
        hint = "; run it from the repository's root" if e.name == "configs" else ""
        raise UserError(f"--config {given}: {_one_line(e)}{hint}") from e
    except Exception as e:  # whatever the file's own code raised
        raise UserError(f"--config {given}: {type(e).__name__}: {_one_line(e)}") from e
    finally:
        sys.argv = before
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; write --config.key=value for an override")
    if config.value is None:
        raise UserError("no configuration: give --config FILE, e.g. --config configs/moe_2bit.py")
    return resolve(config.value), {name: flag.value for name, flag in found.items()}


def _overridden(argv: Sequence[str]) -> list[str]:
    """Keys of the configuration that a command line sets."""
    names = [argument.partition("=")[0].lstrip("-") for argument in argv if argument.startswith("-")]
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]


def _config_file(argv: Sequence[str]) -> str:
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, inline = flag.partition("=")
        if name in ("--config", "-config"):
            return inline if equals else value
    return ""


def _one_line(error: Exception) -> str:
    text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "'")
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # a message that is a quoted string itself
        text = text[1:-1]
    return text
