"""Which token ids end an output, as a checkpoint's files say (generation_config.json, config.json, the tokenizer)."""

from pathlib import Path
from typing import Any

from shoal.server.tokenizer import Tokenizer, read_json


def read_eos_token_ids(folder: Path | None, tokenizer: Tokenizer | None) -> list[int]:
    """Ids that end an output: those of generation_config.json, else of config.json (or its text_config), and the
    tokenizer's own.

    Raises ValueError for an eos_token_id that is neither an id nor a list of ids.
    """
    found: list[int] = []
    if folder is not None:
        config = read_json(folder / "config.json")
        nested = config.get("text_config")
        candidates = [
            (folder / "generation_config.json", read_json(folder / "generation_config.json")),
            (folder / "config.json", config),
            (folder / "config.json", nested if isinstance(nested, dict) else {}),
        ]
        for file, content in candidates:
            if content.get("eos_token_id") is not None:
                found = _ids(content["eos_token_id"], file)
                break
    own = tokenizer.eos_token_id if tokenizer is not None else None
    if own is not None and own not in found:
        found.append(own)
    return found


def _ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, found {value!r}")
    return list(dict.fromkeys(ids))
