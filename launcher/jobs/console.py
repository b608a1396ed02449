"""What a person sees while an attempt runs: a progress bar on a terminal, elsewhere rank 0's log lines as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from launcher.run.output import PatientStream
from launcher.trainer.main import ERROR


class Follower:
    """Reads what is appended to the one file that matches a pattern, once it exists; whole lines only."""

    def __init__(self, folder: Path, pattern: str, *, from_end: bool = False) -> None:
        self._folder, self._pattern = folder, pattern
        file = self._file()
        self._at = file.stat().st_size if from_end and file else 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Lines that have come since the last call."""
        file = self._file()
        if file is None:
            return []
        with file.open("rb") as stream:
            stream.seek(self._at)
            new = stream.read()
        self._at += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def _file(self) -> Path | None:
        return next(self._folder.glob(self._pattern), None)

    def rest(self) -> list[str]:
        """What came after the last whole line, when nothing more will come."""
        lines, rest = self.lines(), self._rest.decode(errors="replace")
        self._rest = b""
        return [*lines, rest] if rest else lines


def _patient(stream: TextIO) -> TextIO:
    """The same output, where a full disk or a reader that has gone ends nothing; a terminal stays as it is."""
    try:
        handle = stream.fileno()
    except (OSError, AttributeError):  # text in memory
        return stream
    if stream.isatty():
        return stream
    stream.flush()
    return cast(TextIO, PatientStream(handle))


class Console:
    """Where the launcher speaks. `say` at any time; between `watch` and `close` the attempt's progress is shown too."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or _patient(sys.stdout)
        self._bar: Any = None
        self._task: Any = None
        self._log: Follower | None = None
        self._metrics: Follower | None = None
        self._tenth: dict[str, int] = {}  # last tenth shown, of each work
        self._total_steps: int | None = None

    @property
    def streams_log(self) -> bool:
        """Whether what rank 0 prints is shown as it comes."""
        return not self._terminal()

    def say(self, text: str) -> None:
        """One message to the person who waits."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def working(self, what: str, done: int, total: int) -> None:
        """Progress of something before training (total 0: unknown): a bar, or a line each tenth."""
        if self._terminal():
            self._show(what, done, total or None)
            return
        tenth = done * 10 // total if total else 0
        if tenth > self._tenth.get(what, -1):
            self._tenth[what] = tenth
            self.say(f"{what}: {done:,} of {total:,}" if total else what)

    def watch(self, *, logs: Path, metrics: Path, total_steps: int | None) -> None:
        """Follow rank 0's log, and on a terminal the metrics."""
        self._end_bar()
        self._total_steps = total_steps
        self._log = Follower(logs, "*/0.log")  # rank 0 may be on any node
        if self._terminal():
            self._metrics = Follower(metrics.parent, metrics.name, from_end=True)
            self._show("starting", 0, None)

    def poll(self) -> None:
        """Show what has come since the last call."""
        self._pass_on(self._log.lines() if self._log else ())
        for line in self._metrics.lines() if self._metrics else ():
            self._advance(line)

    def close(self) -> None:
        """Show what is left and end the bar."""
        self.poll()
        self._pass_on(self._log.rest() if self._log else ())
        self._end_bar()
        self._log = self._metrics = None

    def _pass_on(self, lines: Iterable[str]) -> None:
        """Lines of rank 0, without the error that the end tells; where a bar tells of the steps, those that warn."""
        for line in lines:
            if line.startswith("warning") or (self.streams_log and not line.startswith(ERROR)):
                self.say(line)

    def _advance(self, line: str) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return  # a line cut short by a killed attempt
        if "loss" in values:
            speed = f"  {values['tokens_per_s']:,.0f} tokens/s" if values.get("tokens_per_s") else ""
            self._show(f"loss {values['loss']:.4f}{speed}", values["step"], self._total_steps)

    def _terminal(self) -> bool:
        return self.stream.isatty()

    def _show(self, text: str, done: int, total: int | None) -> None:
        if self._bar is None:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=RichConsole(file=self.stream))
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=done, total=total)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
        self._tenth = {}
