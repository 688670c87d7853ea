"""Tokenizers without a tokenizer.json, through transformers: the only file that imports it, and only when such a
tokenizer is read.

transformers builds the fast tokenizer from the older files (vocab.json and merges.txt, tokenizer.model); what Shoal
works with is the `tokenizers` object inside, so nothing else depends on transformers.
"""

from pathlib import Path
from typing import Any

import tokenizers


def load_backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The `tokenizers` tokenizer of a folder that has no tokenizer.json, and its special tokens by name.

    No code of the checkpoint is run. Raises ValueError when transformers is missing, or finds no tokenizer, or only one
    in Python.
    """
    remedy = "give another tokenizer with tokenizer=FOLDER, or work with token ids (skip_tokenizer_init=True)"
    if not folder.is_dir():
        raise ValueError(f"the tokenizer's folder {folder} does not exist; {remedy}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"{folder} has no tokenizer.json, and older tokenizer files need transformers: "
            f"pip install 'shoal[transformers]'; or {remedy}"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parts raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder} has no tokenizer.json, and transformers finds no tokenizer in it ({first_line}); {remedy}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(
            f"{folder} has a tokenizer of class {type(loaded).__name__}, which is not built on the tokenizers library; "
            f"{remedy}"
        )
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    return copy, {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(name, str)}
