"""Sweeps as data: lists of points, each a dict {dotted config key: value}, put together by four functions.

product(values("quant.experts", ["q2_0", "mxfp4"]), values("train.seed", [0, 1, 2]))     6 points
zip_(values("model.dim", [64, 128]), values("optim.lr", [0.01, 0.005]))                  2 points
chain(..., ...)                                                                          one after the other
"""

import itertools
from collections.abc import Iterable
from typing import Any

from qatmoe.errors import UserError

Point = dict[str, Any]
Points = list[Point]


def values(key: str, of: Iterable[Any]) -> Points:
    """One point for each value of a key. Raises UserError where there is no value."""
    points = [{key: value} for value in of]
    if not points:
        raise UserError(f"values({key!r}, []): a sweep over no values has no runs; give at least one")
    return points


def product(*factors: Points) -> Points:
    """Every combination of one point of each factor, the last factor running fastest. Raises UserError as `_merge`."""
    return [_merge(points, "product") for points in itertools.product(*factors)]


def zip_(*factors: Points) -> Points:
    """The first points of all factors together, then the second ones.

    Raises:
      UserError: the factors have different lengths, or two of them set one key.
    """
    lengths = [len(f) for f in factors]
    if len(set(lengths)) > 1:
        keys = ", ".join(f"{' and '.join(f[0]) if f else 'nothing'} has {len(f)}" for f in factors)
        raise UserError(f"zip_ of unequal lengths: {keys}; give each as many values, or use product")
    return [_merge(points, "zip_") for points in zip(*factors, strict=True)]


def chain(*parts: Points) -> Points:
    """The points of all parts."""
    return list(itertools.chain(*parts))


def _merge(points: Iterable[Point], where: str) -> Point:
    """One point with the keys of all. Raises UserError where two of them set one key."""
    merged: Point = {}
    for point in points:
        for key in point:
            if key in merged:
                raise UserError(f"{where}: {key} is in two factors; let one of them set it, or use chain")
        merged |= point
    return merged
