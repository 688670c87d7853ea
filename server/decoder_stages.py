"""Streaming forms of the decoders of the `tokenizers` library: strings in, text out as soon as it can no longer change.

A tokenizer.json names a decoder, or a sequence of them, that turns the strings of all tokens into text at once. Every
class here does the same for one token after the other: pushing all tokens and closing gives the text of the whole
decode, and what was given out before is a prefix of it, whatever comes later. `settle` marks the end of a prompt: text
that belongs to it goes out, what may become a part of the text after it (half a character) is kept.

After Fuse (and after ByteLevel, which fuses) all strings are pieces of one token; the stages behind it work on pieces.
"""

import codecs
import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

from tokenizers import Regex
from tokenizers import decoders as backend_decoders

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANUPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Stage(ABC):
    """One decoder as a stream, for one sequence. A stage that holds nothing back defines `push` alone."""

    @abstractmethod
    def push(self, token: str) -> list[str]:
        """Take the next string; returns the strings it releases, perhaps none."""

    def close(self) -> list[str]:
        """The sequence is complete: returns what was held back."""
        return []

    def settle(self) -> list[str]:
        """The prompt is complete: returns what is held back of it, but for what may become a part of what follows."""
        return []


class Glued(str):
    """A token's text that takes no space in front: a special token next to another one."""


class Join(Stage):
    """No decoder: tokens with a space between them."""

    def __init__(self) -> None:
        self._first = True

    def push(self, token: str) -> list[str]:
        first, self._first = self._first, False
        return [token if first or isinstance(token, Glued) else " " + token]


class WordPiece(Stage):
    """Words get a space in front, their continuations lose the prefix; `cleanup` takes the spaces off punctuation."""

    def __init__(self, prefix: str, cleanup: bool) -> None:
        self._prefix, self._cleanup, self._first = prefix, cleanup, True

    def push(self, token: str) -> list[str]:
        first, self._first = self._first, False
        if isinstance(token, Glued):
            return [token]
        if not first:
            token = token.removeprefix(self._prefix) if token.startswith(self._prefix) else " " + token
        if self._cleanup:
            for before, after in _CLEANUPS:
                token = token.replace(before, after)
        return [token]


class Metaspace(Stage):
    """The replacement character becomes a space; the first token loses it when the tokenizer had put it there."""

    def __init__(self, replacement: str, strip_first: bool) -> None:
        self._replacement, self._strip = replacement, strip_first

    def push(self, token: str) -> list[str]:
        strip, self._strip = self._strip, False
        return [token.replace(self._replacement, "" if strip else " ")]


class SuffixDecoder(Stage):
    """BPEDecoder: the end-of-word suffix becomes a space, except in the last token; so one token is held."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def push(self, token: str) -> list[str]:
        held, self._held = self._held, token
        return [] if held is None else [held.replace(self._suffix, " ")]

    def close(self) -> list[str]:
        return [] if self._held is None else [self._held.replace(self._suffix, "")]

    def settle(self) -> list[str]:
        text = self.close()
        if self._held is not None:
            self._held = self._suffix if self._suffix and self._suffix in self._held else None
        return text


class ByteLevel(Stage):
    """Every character stands for a byte (the GPT-2 alphabet); a token with another character stands for its own UTF-8
    bytes.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        text = self._decoder.decode(bytes_of_token(token))
        return [text] if text else []

    def close(self) -> list[str]:
        text = self._decoder.decode(b"", final=True)
        return [text] if text else []


class ByteFallback(Stage):
    """Runs of <0xXX> tokens become the characters they spell, or one U+FFFD per byte when the run as a whole is not
    UTF-8.

    A run is held until it ends, because its last byte decides about all of it.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        match = _BYTE_TOKEN.fullmatch(token)
        if match:
            self._run.append(int(match[1], 16))
            return []
        if not self._run:
            return [token]
        return [*self.close(), token]

    def close(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)

    def settle(self) -> list[str]:
        cut = len(self._run) - _unfinished_bytes(self._run)
        rest, self._run = self._run[cut:], self._run[:cut]
        text = self.close()
        self._run = rest
        return text


class Replace(Stage):
    """Replaces a string, or a regular expression, in every token."""

    def __init__(self, pattern: dict[str, str], content: str) -> None:
        self._string = pattern.get("String")
        self._content = content
        self._regex = backend_decoders.Replace(Regex(pattern["Regex"]), content) if self._string is None else None

    def push(self, token: str) -> list[str]:
        if self._regex is not None:
            return [self._regex.decode([token])]
        assert self._string is not None
        return [token.replace(self._string, self._content)]


class Strip(Stage):
    """Takes up to `start` and `stop` of a character off the two ends of every token."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop

    def push(self, token: str) -> list[str]:
        begin, end = 0, len(token)
        while begin < min(self._start, len(token)) and token[begin] == self._content:
            begin += 1
        while end > begin and len(token) - end < self._stop and token[end - 1] == self._content:
            end -= 1
        return [token[begin:end]]


class Fuse(Stage):
    """Joins all tokens to one; its strings are pieces of that one."""

    def push(self, token: str) -> list[str]:
        return [token]


class FusedStrip(Stage):
    """Strip on one token that arrives in pieces: up to `stop` closing characters are held back."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._left, self._stop = content, start, stop
        self._held = ""

    def push(self, token: str) -> list[str]:
        begin = 0
        while begin < len(token) and self._left > 0:
            if token[begin] != self._content:
                self._left = 0
                break
            begin += 1
            self._left -= 1
        text = self._held + token[begin:]
        cut = len(text)
        while cut > 0 and len(text) - cut < self._stop and text[cut - 1] == self._content:
            cut -= 1
        self._held = text[cut:]
        return [text[:cut]] if cut else []

    def close(self) -> list[str]:
        return []

    def settle(self) -> list[str]:
        held, self._held = self._held, ""
        return [held] if held else []


class Whole(Stage):
    """A decoder that sees its token only when it is complete: everything is held until the end."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._pieces: list[str] = []

    def push(self, token: str) -> list[str]:
        self._pieces.append(token)
        return []

    def close(self) -> list[str]:
        return [*self._stage.push("".join(self._pieces)), *self._stage.close()]

    def settle(self) -> list[str]:
        text = self._stage.push("".join(self._pieces))
        self._pieces.clear()
        return text


def build_stages(decoder: dict[str, Any] | None) -> list[Stage]:
    """Fresh stages for a sequence from the "decoder" entry of a tokenizer.json (None: there is none).

    Raises ValueError for a decoder that no text model uses.
    """
    if decoder is None:
        return [Join()]
    declared = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    stages: list[Stage] = []
    fused = False
    for entry in declared:
        stage = _build_stage(entry)
        if fused:
            stage = _on_pieces(entry, stage)
        stages.append(stage)
        fused = fused or isinstance(stage, Fuse | ByteLevel)
    return stages


def _build_stage(entry: dict[str, Any]) -> Stage:
    match entry.get("type"):
        case "ByteLevel":
            return ByteLevel()
        case "Metaspace":
            scheme = entry.get("prepend_scheme", "always" if entry.get("add_prefix_space", True) else "never")
            return Metaspace(entry.get("replacement", "\u2581"), scheme != "never")
        case "WordPiece":
            return WordPiece(entry.get("prefix", "##"), entry.get("cleanup", True))
        case "BPEDecoder":
            return SuffixDecoder(entry.get("suffix", "</w>"))
        case "ByteFallback":
            return ByteFallback()
        case "Replace":
            return Replace(entry["pattern"], entry["content"])
        case "Strip":
            return Strip(entry["content"], entry["start"], entry["stop"])
        case "Fuse":
            return Fuse()
        case other:
            raise ValueError(
                f"the tokenizer's decoder {other!r} is not supported; supported: ByteLevel, Metaspace, WordPiece, "
                "BPEDecoder, "
                "ByteFallback, Replace, Strip, Fuse and one Sequence of them"
            )


def _on_pieces(entry: dict[str, Any], stage: Stage) -> Stage:
    """The form of a stage for one token that arrives in pieces."""
    if isinstance(stage, Fuse):
        return stage
    if isinstance(stage, Strip):
        return FusedStrip(entry["content"], entry["start"], entry["stop"])
    if isinstance(stage, Replace) and len(entry["pattern"].get("String", "")) == 1:
        return stage
    return Whole(stage)


def _byte_of_character() -> dict[str, int]:
    """The GPT-2 alphabet: printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100
    on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@lru_cache(maxsize=1 << 16)
def bytes_of_token(token: str) -> bytes:
    """The bytes a byte-level token stands for."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _unfinished_bytes(run: bytearray) -> int:
    """How many bytes at the end of a run begin a UTF-8 character and do not end it: 0 to 3."""
    for count in range(1, min(3, len(run)) + 1):
        byte = run[-count]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return count if count < needed else 0
        if byte < 0x80:
            return 0
    return 0
