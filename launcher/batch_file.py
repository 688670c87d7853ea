"""The two files of a batch: what is asked, and the answers, to which a batch that was killed is resumed.

An answer is one write of one line at the end of the file, so after a kill the file holds whole answers and at most one
torn line, which is cut off. A lock keeps a second batch out of the same file.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

from shoal.launcher.batch_format import BatchLine, parse_line

MAX_SHOWN = 20


def read_batch(name: str, model_names: tuple[str, ...]) -> list[BatchLine]:
    """The lines of a batch. Raises ValueError with file and line of every mistake that leaves no id to answer under
    (the first 20), and of an id given twice.
    """
    found: dict[str, tuple[int, BatchLine]] = {}
    mistakes = []
    for number, text in _numbered(name):
        try:
            line = parse_line(text, model_names)
            if line.custom_id in found:
                raise ValueError(f"custom_id {line.custom_id!r} was given in line {found[line.custom_id][0]} already")
            found[line.custom_id] = (number, line)
        except ValueError as error:
            mistakes.append(f"{name}:{number}: {error}")
    if mistakes:
        more = len(mistakes) - MAX_SHOWN
        raise ValueError("\n".join(mistakes[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])))
    if not found:
        raise ValueError(f"{name}: holds no request")
    return [line for _, line in found.values()]


def _numbered(name: str) -> Iterator[tuple[int, str]]:
    try:
        with open(name, encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
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
