"""What the tables in a terminal have in common: figures beside their values, and sizes as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


def print_figures(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A table of figures, each with its value."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def print_line(console: Console, text: str) -> None:
    """A line as it is, however long."""
    if console.is_terminal:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:  # the console prints a text twice where Ctrl-C comes between writing and forgetting it
        print(text, file=console.file, flush=True)


def counted(number: int, what: str) -> str:
    """ "1 peer", "1,000 peers"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def size_text(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"
