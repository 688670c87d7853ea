"""Tokenizer: encodes and decodes as transformers does, knows its special tokens, names what it cannot read."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from shoal.server.eos_tokens import read_eos_token_ids
from shoal.server.tokenizer import Tokenizer, TokenizerError
from tests.server.tiny_tokenizers import CORPUS, KINDS, built, with_bos, write_folder

transformers = pytest.importorskip("transformers")

CONFIG = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
DEMO = Path(__file__).resolve().parents[2] / "shoal" / "demo"


def both(folder: Path) -> tuple[Tokenizer, "transformers.PreTrainedTokenizerFast"]:
    """Ours and transformers' of the same folder."""
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    files = {"tokenizer_config.json": json.dumps(CONFIG)}
    return both(write_folder(tmp_path_factory.mktemp(request.param), with_bos(built(request.param)), files))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from([*CORPUS, "<s>hello</s> <tool>x<▁odd one>", "<|user|>a\n\n b"]))
def test_encodes_and_decodes_as_transformers_does(pair, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)
    plain = ours.encode(text, add_special_tokens=False)
    assert plain == theirs.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert ours.decode(plain, skip_special_tokens=skip) == theirs.decode(plain, skip_special_tokens=skip)


def test_special_tokens_are_named_as_in_transformers(pair) -> None:
    ours, theirs = pair
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.eos_token_id, None)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert ours.token_to_id("<tool>") in ours.added_token_ids - ours.special_token_ids


def test_tokens_only_the_configuration_names_are_added(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|call|>"],
        "boi_token": "<image>",
        "added_tokens_decoder": {
            "900": {"content": "<late>", "special": False, "lstrip": True},
            "899": {"content": "<early>", "special": True},
        },
    }
    ours, theirs = both(write_folder(tmp_path, built("byte_level"), {"tokenizer_config.json": json.dumps(config)}))
    text = "a <late><early> <pad><|call|>b<image>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), True) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map


def test_special_tokens_map_is_read_where_the_configuration_has_no_tokens(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": "{}", "special_tokens_map.json": json.dumps({"eos_token": "<|user|>"})}
    ours, theirs = both(write_folder(tmp_path, built("unigram"), files))
    assert ours.eos_token_id == theirs.eos_token_id == ours.token_to_id("<|user|>")


def test_the_post_processor_rules_over_add_bos_token(tmp_path: Path) -> None:
    for bos, source in ((True, built("gemma")), (False, with_bos(built("gemma")))):
        config = json.dumps({**CONFIG, "add_bos_token": bos})
        ours, theirs = both(write_folder(tmp_path / str(bos), source, {"tokenizer_config.json": config}))
        assert ours.encode("hello") == theirs.encode("hello")
        assert (ours.encode("hello")[0] == ours.bos_token_id) is not bos


def test_a_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = Backend.from_str(built("byte_level"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ours = Tokenizer.from_folder(write_folder(tmp_path, backend.to_str()))
    assert 4 < len(ours.encode("the quick brown fox jumps")) < 64


def test_bad_words_are_forbidden_at_the_start_and_behind_a_space() -> None:
    ours = Tokenizer(Backend.from_str(built("byte_level")))
    assert ours.decode(ours.bad_word_ids(["the"])[0]) == "the"
    spaced = ours.bad_word_ids([" quick"])
    assert ours.decode(spaced[0]) == "quick"
    for ids in spaced[1:]:
        assert ours.decode(ids) == " quick" and len(ids) == len(spaced[0])
    with pytest.raises(ValueError, match="has no tokens"):
        ours.bad_word_ids(["  "])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read by tokenizers"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, built("unigram"), {"tokenizer_config.json": "[1]"})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json must hold a JSON object, found list"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*tokenizer=FOLDER.*skip_tokenizer_init"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_vocab_and_merges_files_go_through_transformers(tmp_path: Path) -> None:
    model = json.loads(built("byte_level"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 9}, [5, 6, 2]),
        ({"eos_token_id": 2}, {"eos_token_id": 9}, [2]),
        ({}, {"eos_token_id": 9}, [9, 2]),
        ({}, {"text_config": {"eos_token_id": [7]}}, [7, 2]),
        ({}, {}, [2]),
    ],
)
def test_end_tokens_of_a_checkpoint(tmp_path: Path, generation: dict, config: dict, expected: list[int]) -> None:
    files = {"generation_config.json": json.dumps(generation), "config.json": json.dumps(config)}
    files["tokenizer_config.json"] = json.dumps(CONFIG)
    folder = write_folder(tmp_path, built("byte_level"), files)
    assert read_eos_token_ids(folder, Tokenizer.from_folder(folder)) == expected


def test_an_end_token_that_is_no_id_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id must be a token id or a list of them"):
        read_eos_token_ids(tmp_path, None)


def test_the_demo_models_tokenizer_works_as_in_transformers() -> None:
    ours, theirs = both(DEMO)
    text = "def f(x):\n    return x ** 2  # naïve 👩‍👩‍👧\n"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == rendered
    assert ours.encode_chat(messages) == theirs.encode(rendered, add_special_tokens=False)
