"""What fits where: the tables of docs/memory.md, for a few grids and caches.

python experiments/memory/run.py          counts, and writes the tables into docs/memory.md; seconds
"""

from pathlib import Path

from qatmoe.config import QuantConfig
from qatmoe.plan import SIZES, every, table
from qatmoe.report import fill_tables

PAGE = Path(__file__).parent.parent.parent / "docs" / "memory.md"
TABLES = {  # name: experts, type of the rest, cache
    "q2_0": ("q2_0", "Q8_0", "f16"),
    "q2_0-q8_0": ("q2_0", "Q8_0", "q8_0"),
    "mxfp4": ("mxfp4", "Q8_0", "f16"),
    "bf16": ("none", "BF16", "f16"),
}


def markdown(experts: str, rest: str, cache: str) -> str:
    """The table of all models as the page has it."""
    results = every(QuantConfig(experts=experts), rest=rest, cache=cache, sizes=SIZES)
    head, *rows = table(results)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Entry point."""
    fill_tables(PAGE, {name: markdown(*settings) for name, settings in TABLES.items()})


if __name__ == "__main__":
    main()
