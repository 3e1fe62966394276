"""What commands say: progress bars on a terminal, plain lines in a log, errors as one line."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Tick(Protocol):
    """Moves a bar to `done` and says what has just been done."""

    def __call__(self, done: int, message: str, *, total: int | None = None) -> None:
        """Move to `done` of `total`."""
        ...


def complain(message: str) -> None:
    """Print an error, one line for each of the message's."""
    for line in message.splitlines():
        _errors.print(f"error: {line}", markup=False)


@contextmanager
def progress(what: str, *, total: int | None) -> Iterator[Tick]:
    """Show progress: a live bar on a terminal, a line for each step elsewhere."""
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, message="")

        def move(done: int, message: str, *, total: int | None = None) -> None:
            if bar.tasks[task].completed == 0:  # what was done before this command tells nothing of its speed
                bar.reset(task, completed=done, total=total)
            bar.update(task, completed=done, total=total, message=message)

        yield move


def _lines(what: str, expected: int | None) -> Tick:
    def line(done: int, message: str, *, total: int | None = None) -> None:
        console.print(f"{what}: {done}/{total or expected}: {message}", markup=False, soft_wrap=True)

    return line


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left, numbers to the right."""
    table = Table(header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # names of files and classes are not markup
    # A log has no width of its own, and must not lose columns to a guess.
    Console(highlight=False, width=None if console.is_terminal else 200).print(table)
