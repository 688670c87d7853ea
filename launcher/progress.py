"""How far a start or a batch of requests has come: shown on a terminal, else only the summary."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from shoal.launcher.replica_messages import Starting
from shoal.server.outputs import RequestOutput

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StartLine:
    """One line on standard error that says how far the start is; nothing unless that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, starting: Starting) -> None:
        """Show what is being done."""
        if self._shown:
            share = f" {100 * starting.done // starting.total} %" if starting.total else ""
            print(f"\r\x1b[2K{starting.doing}{share}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """The start is over, well or not."""
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


class BatchProgress:
    """Counts finished requests and their tokens; shows a bar with tokens per second while entered, when `stream` is a
    terminal.

    `finished` may be called from any thread.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.done = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._stream = stream if stream is not None else sys.stderr
        self._started = time.monotonic()
        self._elapsed_s: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "BatchProgress":
        self._started = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task("requests", total=self.total, speed="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._elapsed_s = time.monotonic() - self._started
        if self._bar is not None:
            self._bar.stop()

    def finished(self, output: RequestOutput) -> None:
        """Count a request that ended."""
        self.done += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.generated_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, speed=f"{self.tokens_per_s:.1f} tokens/s")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, until the end."""
        return time.monotonic() - self._started if self._elapsed_s is None else self._elapsed_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of finished requests per second."""
        return self.generated_tokens / max(self.elapsed_s, 1e-9)

    def summary(self) -> str:
        """One line: requests, tokens, time, rate."""
        return (
            f"{self.done} of {self.total} requests: {self.prompt_tokens} prompt tokens, "
            f"{self.generated_tokens} generated in {self.elapsed_s:.2f} s, {self.tokens_per_s:.1f} tokens/s"
        )
