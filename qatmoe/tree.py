"""Names of leaves in nested dicts of parameters."""

from typing import Any


def path_of(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)
