"""Where a detached controller keeps its journal: a private folder on its host, one for each launch of a model.

$XDG_STATE_HOME/shoal/detached/NAME-LAUNCH/journal, else under ~/.local/state. `shoal down` removes it. What models
leave that end in other ways (their cluster is stopped) goes when another model starts on the host, a week later.
"""

import os
import shutil
import time
from pathlib import Path

from shoal.launcher.journal import Journal, JournalInUse

LOCK_TIMEOUT_S = 10.0  # an earlier life of the controller may be about to end
LOCK_RETRY_S = 0.1
LEFTOVER_S = 7 * 86400.0
FILE = "journal"


def state_home() -> Path:
    """The folder of all detached models of this user."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(home) / "shoal" / "detached"


def open_journal(name: str, launch: str) -> Journal:
    """The journal of a model, made if it is not there. Blocks. Raises ValueError when it cannot be made, or another
    process writes it.
    """
    home = state_home()
    folder = home / f"{name}-{launch}"
    try:
        _remove_leftovers(home, folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                return Journal(folder / FILE)
            except JournalInUse:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(LOCK_RETRY_S)
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the controller's journal: {error}; set XDG_STATE_HOME") from error


def remove_journal(journal: Journal) -> None:
    """Close a journal of `open_journal` and remove its folder. Idempotent."""
    journal.close()
    shutil.rmtree(journal.path.parent, ignore_errors=True)


def _remove_leftovers(home: Path, own: Path) -> None:
    """Remove the folders of other launches that nobody has written for LEFTOVER_S, and nobody has open."""
    for path in home.glob(f"*/{FILE}"):
        try:
            if path.parent != own and time.time() - path.stat().st_mtime > LEFTOVER_S:
                remove_journal(Journal(path))
        except (OSError, JournalInUse):
            continue
