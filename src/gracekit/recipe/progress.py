"""Progress bars and lines in the terminal."""

from __future__ import annotations

import warnings

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)


class Bars(Progress):
    """rich's Progress, whose tasks may carry a ``note``."""

    def add_task(self, description: str, *args: object, **fields: object) -> object:  # type: ignore[override]
        """Add a bar."""
        return super().add_task(description, *args, **{"note": "", **fields})  # type: ignore[arg-type]


def progress_bars() -> Progress:
    """Return bars to enter with ``with``; updates may carry a ``note``."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )


def quiet() -> None:
    """Leave the terminal to this program: no bars of transformers' for files of a megabyte, and warnings on one line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, category, *place: f"{category.__name__}: {message}\n"


def say(text: str) -> None:
    """Print a line."""
    console.print(text, markup=False, soft_wrap=True)
