"""Options of a backend: `--option key=value` into the fields of a frozen dataclass.

A number is one of `at_least`; a text may be empty only where that is its default.
"""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from qatmoe.errors import UserError

T = TypeVar("T")


def at_least(least: int, *, default: int) -> Any:
    """A field for a number from `least` on."""
    return dataclasses.field(default=default, metadata={"least": least})


def read(cls: type[T], given: Sequence[str]) -> T:
    """Makes a `cls` of texts "key=value".

    Raises:
      UserError: an unknown key, a value of another type or out of its range, or a missing one of a field without a
        default.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text}: expected key=value")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise UserError(f"--option {text}: no such option; {hint}")
        values[key] = _convert(hints[key], value, text)
        _check(fields[key], values[key], text)
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in values:
            raise UserError(f"this backend needs --option {name}=...")
    return cls(**values)


def _convert(hint: Any, value: str, text: str) -> Any:
    try:
        if hint is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        return hint(value)
    except (ValueError, KeyError) as e:
        raise UserError(f"--option {text}: expected {'true or false' if hint is bool else hint.__name__}") from e


def _check(field: dataclasses.Field[Any], value: Any, text: str) -> None:
    if isinstance(value, str) and not value.strip() and field.default != "":
        raise UserError(f"--option {text}: must not be empty")
    least = field.metadata.get("least")
    if least is not None and value < least:
        raise UserError(f"--option {text}: must be at least {least}")
