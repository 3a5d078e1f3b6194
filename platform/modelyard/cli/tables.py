"""Tables that read well on a terminal and in a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def table(*columns: str, header: bool = True) -> Table:
    """An empty table: with rules on a terminal, plain columns in a pipe."""
    from rich import box
    from rich.table import Table

    terminal = sys.stdout.isatty()
    made = Table(box=box.SIMPLE_HEAD if terminal else None, show_header=header, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=not terminal)
    return made


def add_row(to: Table, *cells: str) -> None:
    """Add a row of plain text."""
    from rich.text import Text

    to.add_row(*map(Text, cells))  # a name may hold what rich reads as markup


def console() -> Console:
    """Where tables are printed; never cut to a width in a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=100_000, highlight=False)
