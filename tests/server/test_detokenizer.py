"""Incremental detokenisation gives the text of a whole decode by the tokenizers library, never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from shoal.server.decoder_stages import build_stages, bytes_of_token
from shoal.server.tokenizer import Tokenizer
from tests.server import tiny_tokenizers

KINDS = sorted(tiny_tokenizers.KINDS)
TOKENIZERS = {kind: Tokenizer(Backend.from_str(tiny_tokenizers.built(kind))) for kind in KINDS}
ids = st.lists(st.integers(0, 530), max_size=40)


def stream(tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    """The pieces a stream gives, the closing one last."""
    detokenizer = tokenizer.detokenizer(prompt or [], skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.close()]


def whole(tokenizer: Tokenizer, token_ids: list[int], skip: bool = True) -> str:
    return tokenizer.backend.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(token_ids=ids, skip=st.booleans())
def test_pieces_of_random_tokens_join_to_the_whole_decode(kind: str, token_ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    assert "".join(stream(tokenizer, token_ids, skip=skip)) == whole(tokenizer, token_ids, skip)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) == whole(tokenizer, token_ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from(tiny_tokenizers.CORPUS))
def test_pieces_of_a_text_join_to_its_whole_decode(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(text)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == whole(tokenizer, token_ids)
    if kind in ("byte_level", "gemma"):
        assert "".join(pieces) == (text.replace("▁", " ") if kind == "gemma" else text)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "odd"])
@settings(max_examples=100, deadline=None)
@given(prompt=ids, token_ids=ids, skip=st.booleans())
def test_text_goes_on_where_the_prompt_ended(kind: str, prompt: list[int], token_ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    before, after = whole(tokenizer, prompt, skip), whole(tokenizer, prompt + token_ids, skip)
    if after.startswith(before) and "\ufffd" not in before:
        assert "".join(stream(tokenizer, token_ids, prompt, skip)) == after.removeprefix(before)


@pytest.mark.parametrize("kind", ["byte_level", "llama_sentencepiece", "unigram", "word_piece"])
def test_a_long_prompt_is_not_read_in_whole(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("the quick brown fox " * 100)
    answer = tokenizer.encode("jumps over")
    detokenizer = tokenizer.detokenizer(prompt)
    read = [detokenizer.push(token_id) for token_id in answer]
    assert "".join(read) + detokenizer.close() == whole(tokenizer, prompt + answer).removeprefix(
        whole(tokenizer, prompt)
    )


def test_first_word_keeps_its_space_behind_text_and_loses_it_behind_nothing() -> None:
    tokenizer = TOKENIZERS["llama_sentencepiece"]
    fox = tokenizer.encode("fox")
    bos = [tokenizer.token_to_id("<s>")]
    assert "".join(stream(tokenizer, fox, tokenizer.encode("quick"))) == " fox"
    assert "".join(stream(tokenizer, fox, bos)) == "fox"


def test_half_a_character_in_the_prompt_is_completed_by_the_output() -> None:
    for kind in ("byte_level", "llama_sentencepiece"):
        tokenizer = TOKENIZERS[kind]
        byte_of = {
            bytes_of_token(string) if kind == "byte_level" else string: token_id
            for string, token_id in tokenizer.backend.get_vocab().items()
        }
        names = [bytes([b]) if kind == "byte_level" else f"<0x{b:02X}>" for b in "x€".encode()]
        ids_ = [byte_of[name] for name in names]
        assert "".join(stream(tokenizer, ids_[2:], ids_[:2])) == "€"


def test_unfinished_character_is_held_and_replaced_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    euro = [tokenizer.backend.token_to_id(character) for character in "âĤ¬"]
    assert stream(tokenizer, euro) == ["", "", "€", ""]
    assert stream(tokenizer, euro[:2]) == ["", "", "\ufffd"]


def test_a_run_of_fallback_bytes_is_one_piece() -> None:
    tokenizer = TOKENIZERS["gemma"]
    run = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€€".encode()]
    a = tokenizer.backend.token_to_id("a")
    assert stream(tokenizer, [*run, a]) == [""] * 6 + ["€€a", ""]
    assert "".join(stream(tokenizer, [*run[:-1], a])) == "\ufffd" * 5 + "a"


def test_special_tokens_stand_close_when_asked() -> None:
    tokenizer = TOKENIZERS["word_piece"]
    specials = [tokenizer.token_to_id(token) for token in ("<s>", "</s>")]
    the = tokenizer.token_to_id("the")
    assert tokenizer.decode([*specials, the]) == "<s> </s> the"
    assert tokenizer.decode([*specials, the], spaces_between_special_tokens=False) == "<s></s> the"
    assert tokenizer.decode([*specials, the], skip_special_tokens=True) == "the"


def test_ids_without_a_token_give_no_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.decode([10**6, tokenizer.token_to_id("a"), 2**40, -1]) == "a"


def test_token_text_reads_as_behind_other_text() -> None:
    assert TOKENIZERS["llama_sentencepiece"].token_text(TOKENIZERS["llama_sentencepiece"].encode("fox")[0]) == " "
    tokenizer = TOKENIZERS["word_piece"]
    assert tokenizer.token_text(tokenizer.token_to_id("the")) == " the"
    assert TOKENIZERS["byte_level"].token_text(TOKENIZERS["byte_level"].token_to_id("â")) == "\ufffd"


@pytest.mark.parametrize("start,stop", [(0, 1), (1, 1), (2, 2), (0, 3)])
@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.text("ab ", max_size=4), max_size=6))
def test_strip_at_both_ends_behind_fuse(start: int, stop: int, pieces: list[str]) -> None:
    decoder = {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": start, "stop": stop}],
    }
    fuse, strip = build_stages(decoder)
    out = [text for piece in pieces for fused in fuse.push(piece) for text in strip.push(fused)]
    text = "".join(pieces)
    expected = text[: len(text) - min(stop, len(text) - len(text.rstrip(" ")))]
    expected = expected[min(start, len(expected) - len(expected.lstrip(" "))) :]
    if text.strip(" "):
        assert "".join([*out, *strip.close()]) == expected


def test_a_decoder_nobody_can_stream_is_refused() -> None:
    backend = Backend.from_str(tiny_tokenizers.built("unigram"))
    backend.decoder = decoders.CTC()
    with pytest.raises(ValueError, match=r"decoder 'CTC' is not supported; supported: ByteLevel, Metaspace"):
        Tokenizer(backend)
