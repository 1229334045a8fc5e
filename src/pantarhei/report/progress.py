"""A progress line for long work: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts work and shows rate and time left, on standard error.

    Args:
        total: units of work.
        what: short description.
        unit: name of a unit, such as "iterations" or "pairs".
        shown: False shows nothing (processes other than the first, tests).
        every: seconds between two plain lines where there is no terminal.
    """

    def __init__(
        self, total: int, what: str, unit: str = "it", *, start: int = 0, shown: bool = True, every: float = 20.0
    ):
        self.total, self.what, self.unit, self.shown, self.every = total, what, unit, shown, every
        self._done = self._start = start
        self._began = self._last = time.monotonic()
        self._bar, self._task = None, None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, completed=start, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Say how far the work is."""
        self._done = done
        if not self.shown:
            return
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=f"{text} {rate:.1f} {self.unit}/s")
        elif now - self._last > self.every or (done >= self.total and now - self._began > self.every):
            self._last = now
            left = (self.total - done) / max(rate, 1e-9)
            print(
                f"{self.what}: {done}/{self.total} {self.unit} {text} {rate:.1f} {self.unit}/s, {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
