"""Tokenizer: a checkpoint's tokenizer.json through the `tokenizers` library, with its special tokens and chat template.

    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.encode("text")      # with the special tokens that the post-processor in tokenizer.json adds
    tokenizer.decode(token_ids)

As in transformers 5, tokenizer.json rules: `add_bos_token` and `add_eos_token` of tokenizer_config.json have no say
beside it. Added and special tokens that only tokenizer_config.json (or special_tokens_map.json) names are added. A
folder without tokenizer.json goes through `shoal.server.transformers_tokenizer`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from shoal.server.chat_template import ChatTemplates, read_chat_templates
from shoal.server.detokenizer import IncrementalDetokenizer, decode_whole, text_in_context

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_CACHED_TEXTS = 1 << 16


class TokenizerError(ValueError):
    """The folder holds no tokenizer that can be read; the text names the file and what to do."""


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_templates: dict[str, str] | None = None,
        source: str = "the tokenizer",
    ) -> None:
        """backend: a tokenizer of the `tokenizers` library, taken over. config: the content of tokenizer_config.json,
        perhaps with that of special_tokens_map.json. chat_templates: name to template. source: names the tokenizer in
        errors.
        """
        config = config or {}
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, config)
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.backend = backend
        self.source = source
        decoder = json.loads(backend.to_str())["decoder"] if backend.decoder is not None else None
        self.decoder_config: dict[str, Any] | None = decoder
        added = backend.get_added_tokens_decoder()
        self.added_token_ids = frozenset(added)
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = _named_tokens(config)
        self.chat = ChatTemplates(chat_templates or {}, self.special_tokens, source)
        self._strings: dict[int, str | None] = {}
        self._texts: dict[int, str] = {}
        self.detokenizer()  # a decoder that is not supported is found here

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a tokenizer from a checkpoint's folder. Raises TokenizerError."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            from shoal.server.transformers_tokenizer import load_backend

            backend, named = load_backend(folder)
            return cls(backend, {**read_json(folder / "tokenizer_config.json"), **named}, *_templates(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower one
            raise TokenizerError(f"{file} cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= read_json(folder / "special_tokens_map.json")
        return cls(backend, config, *_templates(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if the tokenizer names one."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, if the tokenizer names one."""
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, if the tokenizer names one."""
        return self._id_of("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: with those that the post-processor adds, as at the start of a
        document.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids. Ids without a token (the vocabulary's padding) give no text."""
        return decode_whole(
            self,
            token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> IncrementalDetokenizer:
        """A stream from the token ids of one output to its text."""
        return IncrementalDetokenizer(
            self,
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary; None for an id that has none."""
        try:
            return self._strings[token_id]
        except KeyError:
            string = self.backend.id_to_token(token_id) if 0 <= token_id <= 0xFFFFFFFF else None
            if len(self._strings) < _MAX_CACHED_TEXTS:
                self._strings[token_id] = string
            return string

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's string; None when it is not in the vocabulary."""
        return self.backend.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """One token's text as it reads after other text, special tokens shown (a log-probability's `decoded_token`)."""
        text = self._texts.get(token_id)
        if text is None:
            text = text_in_context(self, token_id)
            if len(self._texts) < _MAX_CACHED_TEXTS:
                self._texts[token_id] = text
        return text

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation; options as `ChatTemplates.render` takes them. Encode it without special
        tokens.
        """
        return self.chat.render(messages, **options)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """The prompt's token ids of a conversation; the template writes the special tokens."""
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences to forbid, for `bad_words`: each word as at the start of a text and as after a space, when
        the two differ in their first token and agree in length (as vLLM has it).
        """
        found: list[list[int]] = []
        for word in words:
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise ValueError(f"bad_words: {word!r} has no tokens; leave it out")
            found.append(bare)
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                found.append(spaced)
        return found

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, {} when the file does not exist. Raises TokenizerError when it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def _templates(folder: Path) -> tuple[dict[str, str], str]:
    return read_chat_templates(folder, read_json(folder / "tokenizer_config.json")), str(folder)


def _content(token: Any) -> str | None:
    """The string of a token in a configuration: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, the checkpoint's own included (boi_token, ...), by name."""
    named = {}
    extra = config.get("extra_special_tokens")
    for source in (config, extra if isinstance(extra, dict) else {}):
        for name, token in source.items():
            content = _content(token)
            if name.endswith("_token") and content is not None:
                named[name] = content
    return named


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json names and tokenizer.json lacks, as transformers does: first the added
    ones in the order of their ids, then the special ones.
    """
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = _named_tokens(config)
    missing: dict[str, tokenizers.AddedToken] = {}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        content = _content(entry)
        if content is None or content in present:
            continue
        flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "normalized", "single_word") if name in entry}
        special = bool(entry.get("special")) or content in named.values()
        missing[content] = tokenizers.AddedToken(content, special=special, **flags)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    standard = [named.get(name) for name in _NAMED]
    for token in [*standard, *named.values(), *map(_content, extra if isinstance(extra, list) else [])]:
        if token is not None and token not in present and token not in missing:
            missing[token] = tokenizers.AddedToken(token, special=True)
    if missing:
        backend.add_tokens(list(missing.values()))
