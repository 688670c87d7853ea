"""Incremental detokenisation: token ids in, text out, each piece final; together they are the whole decode.

Never half a character: bytes of an unfinished one wait for the rest, and become U+FFFD at the end as they would in a
whole decode. The cost of a token is constant. Text begins where the prompt's text ended, so a sentencepiece model's
output keeps the space in front of its first word when the prompt has text.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shoal.server.decoder_stages import Glued, Stage, build_stages

_HEAD_AND_TAIL = 16  # prompt tokens fed from each end; no decoder looks further back


class TokenStrings(Protocol):
    """What a detokenizer needs of a tokenizer."""

    added_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    decoder_config: dict[str, Any] | None

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary; None for an id that has none (the vocabulary's padding)."""


class IncrementalDetokenizer:
    """The text of one sequence as its tokens arrive.

    skip_special_tokens: special tokens give no text. spaces_between_special_tokens: with False, an added token that
    follows another one takes no space in front (only decoders that separate tokens by spaces put one).
    prompt_token_ids: what the sequence continues.
    """

    def __init__(
        self,
        tokenizer: TokenStrings,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._string_of: Callable[[int], str | None] = tokenizer.id_to_token
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._gluable = frozenset() if spaces_between_special_tokens else tokenizer.added_token_ids
        self._after_added = False
        self._closed = False
        self._stages: list[Stage] = build_stages(tokenizer.decoder_config)
        if prompt_token_ids:
            self._prime(prompt_token_ids)

    @classmethod
    def after_text(cls, tokenizer: TokenStrings) -> "IncrementalDetokenizer":
        """A stream that stands behind some text, special tokens shown."""
        stream = cls(tokenizer, skip_special_tokens=False)
        stream._run(["x"], 0)
        stream._settle()
        return stream

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text it completes, perhaps none."""
        if token_id in self._skipped:
            return ""
        string = self._string_of(token_id)
        if string is None:
            return ""
        if self._gluable:
            added = token_id in self._gluable
            if added and self._after_added:
                string = Glued(string)
            self._after_added = added
        return self._run([string], 0)

    def close(self) -> str:
        """The sequence is complete: returns the text that was held back. Nothing may be pushed afterwards."""
        assert not self._closed, "a detokenizer is closed once"
        self._closed = True
        text = []
        for depth, stage in enumerate(self._stages):
            text.append(self._run(stage.close(), depth + 1))
        return "".join(text)

    def _run(self, strings: list[str], depth: int) -> str:
        """Send strings through the stages from `depth` on."""
        for stage in self._stages[depth:]:
            if not strings:
                return ""
            strings = stage.push(strings[0]) if len(strings) == 1 else [out for s in strings for out in stage.push(s)]
        return "".join(strings)

    def _prime(self, prompt_token_ids: Sequence[int]) -> None:
        """Bring the stages where they are after the prompt, reading its first visible token and its last ones."""
        tail = prompt_token_ids
        if len(prompt_token_ids) > 2 * _HEAD_AND_TAIL:
            tail = prompt_token_ids[-_HEAD_AND_TAIL:]
            for token_id in prompt_token_ids[:-_HEAD_AND_TAIL]:
                if token_id not in self._skipped and self._string_of(token_id) is not None:
                    self.push(token_id)
                    break
        for token_id in tail:
            self.push(token_id)
        self._settle()

    def _settle(self) -> None:
        """What was pushed so far is the prompt's: let go of its text, keep what concerns the text to come."""
        for depth, stage in enumerate(self._stages):
            self._run(stage.settle(), depth + 1)


def decode_whole(
    tokenizer: TokenStrings,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool = False,
    spaces_between_special_tokens: bool = True,
) -> str:
    """The text of a complete sequence of token ids."""
    stream = IncrementalDetokenizer(
        tokenizer,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )
    return "".join([*(stream.push(token_id) for token_id in token_ids), stream.close()])


def text_in_context(tokenizer: TokenStrings, token_id: int) -> str:
    """One token's text as it reads after other text: a word keeps its space in front; half a character is U+FFFD."""
    stream = IncrementalDetokenizer.after_text(tokenizer)
    return stream.push(token_id) + stream.close()
