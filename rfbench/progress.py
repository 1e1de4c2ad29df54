"""Progress of long work on stderr, with the latest figures beside it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SHOWN = ("loss", "critic_loss", "reward", "weight", "weight_ess", "grad_norm_generator")


def say(sentence: str) -> None:
    """One line on stderr, unbroken."""
    Console(stderr=True).print(sentence, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """A bar while it is open; on a terminal live, elsewhere one line at the end."""

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.console = Console(stderr=True)
        self.figures: dict[str, float] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        self.bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bars.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def advance(self, count: int = 1, figures: Mapping[str, Any] | None = None) -> None:
        """`count` more are done; `figures` are the latest numbers of whatever is measured on the way."""
        self.done += count
        self.figures |= {key: figures[key] for key in SHOWN if figures and key in figures}
        text = "  ".join(f"{key} {value:.3g}" for key, value in self.figures.items())
        self.bars.update(self.task, completed=self.done, figures=text)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()
        if not self.console.is_terminal and error is None:
            text = "".join(f", {key} {value:.3g}" for key, value in self.figures.items())
            self.console.print(f"{self.title}: {self.done}/{self.total}{text}", markup=False, highlight=False)
