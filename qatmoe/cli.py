"""What entry points share: command lines of `--config FILE` and `--config.key=value`, and how a program ends."""

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import RequiredValueError

from qatmoe.config import Config, check_key, default_config, phase, resolve
from qatmoe.errors import UserError


def run(main: Callable[[], int]) -> int:
    """Runs an entry point as a program, and returns its exit code.

    Characters that the standard output's encoding lacks are written as "?". Where its reader went away, as `head` does,
    the program ends without a word, with 141 as if SIGPIPE had ended it. A KeyboardInterrupt ends it at once, with 130
    and a line that has what the exception says.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return main()
        finally:  # also after the SystemExit of --help
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt as e:
        _end_interrupted(e)
    except OSError as e:
        before: BaseException | None = e
        while isinstance(
            before, BrokenPipeError
        ):  # of the flush or of a last word, as where Ctrl-C ended the reader too
            before = before.__context__
        if isinstance(before, KeyboardInterrupt):
            _end_interrupted(before)
        if not isinstance(e, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 128 + signal.SIGPIPE


def _end_interrupted(why: KeyboardInterrupt) -> NoReturn:
    """Ends the process: XLA may compile in a thread, which the interpreter would wait for, to crash then."""
    with contextlib.suppress(OSError):  # nobody may read it any more
        if sys.stderr is not None:
            print("; ".join(["interrupted", *map(str, why.args)]), file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


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
    found: dict[str, flags.FlagHolder] = {}
    for name, default in options.items():
        if isinstance(default, bool):
            found[name] = flags.DEFINE_boolean(name, default, "", flag_values=values)
        else:
            found[name] = flags.DEFINE_string(name, default, "", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(usage)
        raise SystemExit(0)
    given, words = _apart(argv[1:])
    keys = _overridden(words)
    for key in keys:
        check_key(key)
    if not given:
        raise UserError("no configuration: give --config FILE, e.g. --config configs/moe_2bit.py")
    raw = load(given)
    try:
        for key in keys:
            complete(raw, key)
        config = config_flags.DEFINE_config_dict("config", raw, flag_values=values, sys_argv=words)
        rest = values([argv[0], *words])
    except UserError:
        raise
    except flags.UnrecognizedFlagError as e:
        group = e.flagname.partition(".")[0]
        known = {field.name for field in dataclasses.fields(Config)}
        hint = f"; did you mean --config.{e.flagname}?" if group in known else ""
        raise UserError(f"{_one_line(e)}{hint}") from e
    except flags.Error as e:
        raise UserError(_one_line(e)) from e
    except Exception as e:  # keys that are no text, and whatever else a ConfigDict may hold
        raise UserError(f"--config {given}: {type(e).__name__}: {_one_line(e)}") from e
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; write --config.key=value for an override")
    return resolve(config.value), {name: flag.value for name, flag in found.items()}


def load(given: str, option: str = "--config") -> ConfigDict:
    """What get_config() of a file returns; after a ":" stands its argument.

    ml_collections' own loading folds the traceback of what a file raised into one message, and config files are read by
    sweeps too.

    Args:
      option: what names the file, for messages.

    Raises:
      UserError: there is no such file, it fails, or it returns something else than keys and values.
    """
    file, colon, argument = given.partition(":")
    if not os.path.isfile(file):  # and not Path.is_file(), which raises where a name is too long
        raise UserError(f"{option} {given}: no such file; paths are from the repository's root, or absolute")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise UserError("has no get_config(); configs/toy.py shows one")
        arguments = [argument] if colon else []
        _check_call(get_config, arguments)
        config = get_config(*arguments)
        if not isinstance(config, Mapping | ConfigDict):
            raise UserError(f"get_config() returns a {type(config).__name__}; return a ConfigDict")
        config = ConfigDict(config)  # where it was frozen it can be set again
        if unset := _unset(config, "config"):
            raise UserError(
                f"{', '.join(unset)}: a required placeholder; give it a value in the file, not on the command line"
            )
        return config
    except UserError as e:
        raise UserError(f"{option} {given}: {e}") from e
    except ModuleNotFoundError as e:  # a config that builds on another one
        hint = "; run it from the repository's root" if e.name == "configs" else ""
        raise UserError(f"{option} {given}: {_one_line(e)}{hint}") from e
    except Exception as e:  # whatever the file's own code raised
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"{option} {given}: {where}{type(e).__name__}: {_one_line(e)}") from e


def _unset(config: ConfigDict, path: str) -> list[str]:
    """The keys whose required placeholder has no value."""
    found: list[str] = []
    for key in config:
        try:
            found += _unset(config[key], f"{path}.{key}") if isinstance(config[key], ConfigDict) else []
        except RequiredValueError:
            found.append(f"{path}.{key}")
    return found


def complete(config: ConfigDict, key: str) -> None:
    """Gives a key that a command line sets its default where the file leaves it out: only what is there can be set.

    Args:
      key: dotted; `check_key` knows it.

    Raises:
      UserError: the key is of a phase that there is not, or of a value in place of a group.
    """
    node, known, path = config, default_config(), "config"
    for part in key.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{path}={node!r}: expected a group of keys, of which --config.{key} sets one")
        of_phases = path == "config.train.phases"
        if of_phases and part not in node:
            raise UserError(f"--config.{key}: there is no phase {part!r}; the file has {', '.join(node) or 'none'}")
        if part not in node:
            with node.unlocked():
                node[part] = known[part]
        node, known, path = node[part], phase() if of_phases else known[part], f"{path}.{part}"


def _apart(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What --config names, the last one where there are several, and the other words, those of --flagfile in its place.

    Raises:
      UserError: a --flagfile cannot be read.
    """
    try:
        words = iter(flags.FlagValues().read_flags_from_files(list(arguments), force_gnu=False))
    except flags.Error as e:
        raise UserError(_one_line(e)) from e
    given, others = "", []
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            given = value if equals else next(words, "")
        else:
            others.append(word)
    return given, others


def _overridden(words: Sequence[str]) -> list[str]:
    """Keys of the configuration that a command line sets, as --config.key or, of a switch, --noconfig.key."""
    names = [word.partition("=")[0].lstrip("-").removeprefix("no") for word in words if word.startswith("-")]
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]


def _check_call(get_config: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Raises UserError where a function does not take these arguments, which a command line gives after a ":"."""
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError as e:
        raise UserError(f"get_config{signature}: {e}; what stands after FILE: is its argument") from e


def _one_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if text[:1] in ("'", '"'):  # a quoted message: what a ConfigDict makes of a KeyError
        with contextlib.suppress(ValueError, SyntaxError):
            text = str(ast.literal_eval(text))
    return " ".join(text.split())
