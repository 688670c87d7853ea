"""Finds the checkpoint's folder: a local one, the demo model of this package, or a hub repository, downloaded.

The only file that imports huggingface_hub, and only when a hub id is given.
"""

import re
from importlib import resources
from pathlib import Path

from shoal.configs.problems import ConfigError, Problem, nearest

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "*.md"]
_HUB_SUBFOLDERS = ["*/*"]
_HUB_TIMEOUT_S = 10.0
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin")


def is_local(path: str) -> bool:
    """Whether the text means something on this machine: it looks like a path or exists. Such a text never leaves it."""
    looks_local = path.startswith(("/", "./", "../", "~")) or path in (".", "..") or path.endswith(_FILE_SUFFIXES)
    return looks_local or Path(path).exists() or _HUB_ID.fullmatch(path) is None


def resolve_model_path(path: str, revision: str | None = None) -> Path:
    """The folder of the checkpoint `path` names, after downloading it when it is a hub id.

    path: a folder, `demo`, or a hub id such as `Qwen/Qwen3-0.6B` (a folder named demo is written `./demo`). revision:
    branch, tag or commit of a hub repository. Downloads show their progress and resume where they stopped; only
    safetensors, tokenizer and configuration files are taken. Raises ConfigError naming what to do instead.
    """
    if path == DEMO:
        return _demo(revision)
    if is_local(path):
        return _local(path, revision)
    return _checked(_download(path, revision), path)


def _demo(revision: str | None) -> Path:
    _refuse_revision(DEMO, revision)
    folder = Path(str(resources.files("shoal.demo")))
    if not (folder / "config.json").is_file():
        raise _error(DEMO, f"the demo model's files are missing from {folder}; install shoal again")
    return folder


def _local(path: str, revision: str | None) -> Path:
    _refuse_revision(path, revision)
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf":
        raise _error(path, "GGUF files are not supported; give the folder or hub id of the original safetensors model")
    if not folder.exists():
        raise _error(path, f"no such folder{_similar(folder)}")
    if not folder.is_dir():
        raise _error(
            path, f"is a file; give the folder that holds config.json and the weights, such as {folder.parent}"
        )
    return _checked(folder, path)


def _checked(folder: Path, path: str) -> Path:
    """The folder, once it is plain that a checkpoint is in it."""
    if (folder / "config.json").is_file():
        return folder
    if any(folder.glob("*.gguf")):
        raise _error(path, "holds GGUF files, which are not supported; use the original safetensors model")
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise _error(path, f"has no config.json, so it is no Hugging Face checkpoint; found there: {found}")


def _similar(folder: Path) -> str:
    """A folder beside the missing one whose name is close to it, as a question."""
    try:
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    found = nearest(folder.name, beside)
    return "" if found is None else f"; did you mean {folder.parent / found}?"


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    named = repo if revision is None else f"{repo} at revision {revision}"
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_SUBFOLDERS,
            etag_timeout=_HUB_TIMEOUT_S,
        )
    except errors.GatedRepoError:
        message = "is gated: accept its conditions on the model's page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        message = "is neither a folder here nor a repository on the hub (a private one needs `hf auth login`)"
    except errors.RevisionNotFoundError:
        raise _error(repo, f"the hub repository has no revision {revision}", "model.revision", revision) from None
    except (errors.HFValidationError, errors.HfHubHTTPError) as error:
        message = f"the hub refused {named}: {_first_line(error)}"
    except errors.LocalEntryNotFoundError as error:
        message = (
            f"is no folder here, and the hub cannot be reached ({_first_line(error)}). Connect once to download it, or "
            "copy the model to this machine and give its folder, or try `demo`, which needs no network"
            f"{_similar(Path(repo))}"
        )
    except OSError as error:
        message = f"downloading {named} failed: {_first_line(error)}; run the same command again to resume"
    else:
        return Path(folder)
    raise _error(repo, message)


def _refuse_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        message = f"only hub repositories have revisions, and {path} is a local folder; leave it out"
        raise _error(path, message, "model.revision", revision)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _error(path: str, message: str, key: str = "model.path", value: str | None = None) -> ConfigError:
    return ConfigError([Problem(key=key, value=path if value is None else value, message=message)])
