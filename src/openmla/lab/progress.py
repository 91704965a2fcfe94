"""Telling a person how far a long run is: a live display on a terminal, sentences everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Say = Callable[[str], None]

_EVERY_S = 5.0  # between two sentences about the same stage


class Stages:
    """Named stages of a run and how long each took. Reports through `say`, or through a `LiveDisplay`."""

    def __init__(self, total: int, say: Say | None) -> None:
        self.total, self._say = total, say
        self.seconds: list[tuple[str, float]] = []
        self._last = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Run a stage; yields a function that takes the share done, 0 to 1."""
        number, begin = len(self.seconds) + 1, time.perf_counter()
        self._last = begin
        live = self._say if isinstance(self._say, LiveDisplay) else None
        if live:
            live.begin(name, number, self.total)
        elif self._say:
            self._say(f"[{number}/{self.total}] {name}")

        def share(done: float) -> None:
            if live:
                live.share(done)
            elif self._say and time.perf_counter() - self._last > _EVERY_S:
                self._last = time.perf_counter()
                self._say(f"[{number}/{self.total}] {name}: {100 * done:.0f} %")

        try:
            yield share
        finally:
            self.seconds.append((name, time.perf_counter() - begin))
        if live:
            live.share(1.0)


class LiveDisplay:
    """Bars on stderr, one per stage. Also callable with a sentence, like any other `Say`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars: Any = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=2,  # drawing shares the processor with what is being timed
            redirect_stdout=sys.stdout.isatty(),  # else results meant for a file would land on the terminal
        )
        self._task: Any = None

    def __enter__(self) -> LiveDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self._bars.console.print(sentence)

    def begin(self, name: str, number: int, total: int) -> None:
        """Open the bar of a stage."""
        self._task = self._bars.add_task(f"[{number}/{total}] {name}".replace("[", "\\["), total=1.0)

    def share(self, done: float) -> None:
        """Move the bar of the open stage."""
        self._bars.update(self._task, completed=done)


@contextlib.contextmanager
def on_stderr() -> Iterator[Say]:
    """A live display when stderr is a terminal and rich is installed, else sentences on stderr."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError), LiveDisplay() as display:
            yield display
            return

    def say(sentence: str) -> None:
        sys.stderr.write(sentence + "\n")
        sys.stderr.flush()

    yield say
