"""Small tokenizers of every kind, trained on a few lines, built once per process."""

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and it's don't won't they've we're I'm",
    "def add(a, b):\n    return a + b\n\n\nclass Queue:\n\tpass",
    "naïve café Zürich, Ærøskøbing; Καλημέρα κόσμε; Привет, мир; 你好，世界；こんにちは世界; 👩‍👩‍👧‍👦 🏳️‍🌈 😀😃",
    "1 2 3 10 100 2024 3.14159 -- ... !? do not do not . , ! ' s",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level() -> Tokenizer:
    """GPT-2 and Llama 3 style: bytes as characters, no token for the unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet)
    return _trained(tokenizer, trainer)


def llama_sentencepiece() -> Tokenizer:
    """Llama 2 style: ▁ for spaces, byte fallback, the leading space stripped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=[*SPECIALS, *bytes_], limit_alphabet=60)
    trained = _trained(tokenizer, trainer)
    return _with_plain_bytes(trained, bytes_)


def gemma() -> Tokenizer:
    """Gemma style: as Llama's, nothing stripped."""
    tokenizer = llama_sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """T5 and XLM-R style: Unigram with a Metaspace decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    return _trained(tokenizer, trainer)


def word_piece() -> Tokenizer:
    """BERT style."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False))


def suffix() -> Tokenizer:
    """The first GPT's style: an end-of-word suffix."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, end_of_word_suffix="</w>")
    return _trained(tokenizer, trainer)


def plain() -> Tokenizer:
    """No decoder at all: tokens joined by spaces."""
    tokenizer = unigram()
    tokenizer.decoder = None
    return tokenizer


def odd() -> Tokenizer:
    """A sequence nobody uses, with stages behind Fuse."""
    tokenizer = llama_sentencepiece()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Strip("e", 1, 0),
            decoders.Replace(Regex("o+"), "0"),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.Replace("th", "TH"),
            decoders.Strip(" ", 2, 0),
        ]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    function.__name__: function
    for function in (byte_level, llama_sentencepiece, gemma, unigram, word_piece, suffix, plain, odd)
}


@functools.cache
def built(kind: str) -> str:
    """The tokenizer.json of a kind, with its special and two added tokens."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<▁odd one>", special=False)])
    return tokenizer.to_str()


def with_bos(tokenizer_json: str) -> str:
    """The same with a post-processor that begins with <s>."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    bos = tokenizer.token_to_id("<s>")
    assert bos is not None
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer.to_str()


def write_folder(folder: Path, tokenizer_json: str, files: dict[str, str] | None = None) -> Path:
    """A checkpoint's folder with a tokenizer and other files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    if hasattr(trainer, "show_progress"):
        trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return tokenizer


def _with_plain_bytes(tokenizer: Tokenizer, bytes_: list[str]) -> Tokenizer:
    """Byte tokens in the vocabulary only: as added tokens they would be found in text."""
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(content))
