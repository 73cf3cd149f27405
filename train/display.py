"""What is shown of a running stage: a bar with the time left or, where there is no terminal, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class StageDisplay:
    """Shows one stage; the `Watcher` that train.supervisor tells."""

    def __init__(self, console: Console, stage: str) -> None:
        self.console = console
        self.stage = stage
        self._begun = time.monotonic()
        self._last_line = self._begun
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(stage, total=None, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, step: int, steps: int | None, text: str) -> None:
        """Move the bar; a restarted stage moves it back to where it resumed."""
        self._bar.update(self._task, completed=step, total=steps, text=escape(text))
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            of = f" of {steps}" if steps else ""
            remaining = self._bar.tasks[0].time_remaining
            left = f", about {remaining:.0f} s left" if remaining is not None else ""
            self.say(f"{self.stage}: {step}{of} after {now - self._begun:.0f} s{left}  {text}")

    def say(self, text: str) -> None:
        """One line above the bar, as it is (no markup)."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
