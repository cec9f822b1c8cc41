"""Names of leaves in nested dicts of parameters."""

from typing import Any

import jax


def path_of(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf}, in the order of the tree's leaves. Raises ValueError where two leaves have one path."""
    leaves = jax.tree.leaves_with_path(tree)
    found = {path_of(path): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two leaves of a tree have one path: keys must not contain '/' where a nested key could")
    return found
