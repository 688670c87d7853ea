"""The two files of a batch: what is asked, and the answers, to which a batch that was killed is resumed.

An answer is one write of one line at the end of the file, so after a kill the file holds whole answers and at most one
torn line, which is cut off. A lock keeps a second batch out of the same file.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

from shoal.launcher.batch_format import BatchLine, parse_line

MAX_SHOWN = 20


class BatchInput:
    """The lines of a batch, which stay in the file. ids: their custom_ids, in order."""

    def __init__(self, name: str, model_names: tuple[str, ...]) -> None:
        """Check every line. model_names: what `model` may say. Raises ValueError with file and line of every mistake
        that leaves no id to answer under (the first 20), and of an id given twice.
        """
        self.name, self._model_names = name, model_names
        self._file = _open(name)
        first: dict[str, int] = {}
        mistakes = []
        for number, text in self._numbered():
            try:
                custom_id = parse_line(text, model_names).custom_id
                if custom_id in first:
                    raise ValueError(f"custom_id {custom_id!r} was given in line {first[custom_id]} already")
                first[custom_id] = number
            except ValueError as error:
                mistakes.append(f"{name}:{number}: {error}")
        if mistakes:
            more = len(mistakes) - MAX_SHOWN
            raise ValueError("\n".join(mistakes[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])))
        if not first:
            raise ValueError(f"{name}: holds no request")
        self.ids = list(first)

    def lines(self) -> Iterator[BatchLine]:
        """The lines, read as they are asked for."""
        for _, text in self._numbered():
            yield parse_line(text, self._model_names)

    def _numbered(self) -> Iterator[tuple[int, str]]:
        try:
            self._file.seek(0)
            yield from ((number, line) for number, line in enumerate(self._file, 1) if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: is not UTF-8: {error.reason} at byte {error.start}") from error

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def _open(name: str) -> TextIO:
    """The file; a copy of what can be read only once (a pipe). Raises ValueError."""
    try:
        file = open(name, encoding="utf-8-sig")  # noqa: SIM115 - read twice
        if file.seekable():
            return file
        with file:
            copy = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - likewise
            shutil.copyfileobj(file, copy)
            return copy
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not UTF-8: {error.reason} at byte {error.start}") from error


class AnswerFile:
    """The answers. done: ids that have one, also from earlier runs."""

    def __init__(self, name: str) -> None:
        """Open, lock and read what is there; a torn last line is cut off. Raises ValueError when the file cannot be
        written, holds something else, or belongs to a batch that runs.
        """
        self.name = name
        try:
            self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"-o {name}: cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read()
        except BlockingIOError:
            os.close(self._fd)
            raise ValueError(f"-o {name}: another batch writes to it now") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> set[str]:
        done: set[str] = set()
        end = 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line)
                    done.add(answer["custom_id"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"-o {self.name}:{number}: is no answer of a batch; give another file, or remove this one"
                    ) from None
                end += len(line)
        os.ftruncate(self._fd, end)
        return done

    def add(self, answer: dict[str, Any]) -> None:
        """Append an answer. Raises OSError."""
        data = (json.dumps(answer, ensure_ascii=False) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data) :]
        self.done.add(answer["custom_id"])

    def close(self) -> None:
        """Have it on the disk, and unlock it. Idempotent."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1
