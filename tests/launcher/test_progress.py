"""Progress is shown on a terminal only; the summary counts what finished."""

import io
import sys

import pytest

from shoal.launcher.progress import BatchProgress, StartLine
from shoal.launcher.replica_messages import Starting
from shoal.server.outputs import CompletionOutput, RequestOutput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def output(tokens: int) -> RequestOutput:
    completions = [CompletionOutput(index=k, text="", token_ids=[1] * tokens) for k in range(2)]
    return RequestOutput(request_id="r", prompt=None, prompt_token_ids=[1, 2, 3], outputs=completions, finished=True)


def test_a_terminal_gets_a_bar_and_a_file_nothing() -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        with BatchProgress(3, stream) as progress:
            progress.finished(output(5))
            progress.finished(output(1))
        text = stream.getvalue()
        assert ("2/3" in text and "tokens/s" in text) is shown and bool(text) is shown
        assert progress.summary().startswith("2 of 3 requests: 6 prompt tokens, 12 generated in ")
        assert progress.tokens_per_s == 12 / progress.elapsed_s


def test_the_start_is_told_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((Terminal(), "weights 25 %"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        line = StartLine()
        line(Starting(doing="weights", done=1, total=4))
        line.clear()
        assert expected in stream.getvalue() and bool(stream.getvalue()) is bool(expected)
