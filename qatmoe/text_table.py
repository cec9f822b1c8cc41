"""Tables of text, for a terminal and as Markdown."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of rows of equal length: columns as wide as their widest cell, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table of rows of equal length, the first its heading; columns after the first `left` flush right."""
    head, *rest = rows
    rules = ["---" if left is None or i < left else "---:" for i in range(len(head))]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rest)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])
