"""How a failure looks: one panel on standard error, the first cause first; the traceback only when asked for."""

import sys
import traceback
from pathlib import Path


def show_failure(title: str, body: str, hint: str = "") -> None:
    """Print one panel: in a frame on a terminal, as plain lines otherwise."""
    text = f"{body}\n\n{hint}" if hint else body
    if not sys.stderr.isatty():
        lines = [f"shoal: {title}", *(f"  {line}" if line else "" for line in text.splitlines())]
        print("\n".join(lines), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=Text(title), title_align="left", border_style="red"))


def describe(error: BaseException) -> str:
    """An exception in words: its text, the causes behind it, and for an error nobody worded the place it comes from."""
    lines: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        text = str(cause).strip()
        plain = isinstance(cause, ValueError | OSError | RuntimeError) and text
        line = text if plain else f"{type(cause).__name__}: {text}" if text else type(cause).__name__
        if not plain and (place := _place(cause)):
            line += f" (at {place})"
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else text
        if not lines:
            lines.append(line)
        elif said not in lines[-1]:
            lines.append(f"because: {line}")
        cause = cause.__cause__
    return "\n".join(lines)


def show_traceback(error: BaseException) -> None:
    """The whole traceback on standard error, for log_level debug."""
    traceback.print_exception(error, file=sys.stderr)


def _place(error: BaseException) -> str:
    """The last file and line of an exception's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
