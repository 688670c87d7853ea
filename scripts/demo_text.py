"""The text and the tokenizer of Shoal's demo model: the Python standard library of this machine (see train_demo.py).

Documents come in three kinds: 'python' (the sources, tests left out), 'english' (docstrings, block comments,
documentation strings of the modules written in C, pydoc's topics, the licence) and 'chat' (short questions and answers
made from these). About 1 % of the files, modules and topics, chosen by a hash of their names, are held out with all
that is made from them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

KINDS = ("python", "english", "chat")
EOT, USER, ASSISTANT, END = SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
# Words are split as Llama 3 splits them: runs of letters, of at most three digits, of signs, of spaces and line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{{- bos_token }}
{%- set pending = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set pending.system = pending.system + message.content | trim + '\\n\\n' %}
{%- elif message.role == 'user' %}
{{- '<|user|>' + pending.system + message.content | trim + '<|end|>' }}
{%- set pending.system = '' %}
{%- elif message.role == 'assistant' %}
{%- if pending.system %}
{{- '<|user|>' + pending.system | trim + '<|end|>' }}
{%- set pending.system = '' %}
{%- endif %}
{{- '<|assistant|>' + message.content | trim + '<|end|>' }}
{%- else %}
{{- raise_exception('the role must be system, user or assistant, not ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if pending.system %}
{{- '<|user|>' + pending.system | trim + '<|end|>' }}
{%- endif %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""


def is_held_out(name: str) -> bool:
    """Whether the file, module or topic `name` is kept for evaluation: one in 64, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 64 == 0


@dataclass
class Corpus:
    """Documents by kind, split in two by the name of what they come from."""

    train: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    held_out: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, origin: str, kind: str, text: str) -> None:
        """File `text` on the side of its `origin`; an empty text is no document."""
        side = self.held_out if is_held_out(origin) else self.train
        if text.strip():
            side[kind].append(text.strip("\n") + ("" if kind == "chat" else "\n"))


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring on one line, without a leading signature such as `len(obj, /) ->`."""
    paragraphs = [" ".join(p.split()) for p in doc.split("\n\n") if p.strip()]
    if len(paragraphs) > 1 and re.match(r"^[\w.]+\(.*\)( ->.*)?$", paragraphs[0]):
        paragraphs.pop(0)
    match = re.match(r".{12,}?[.!?](?= [A-Z]|$)", paragraphs[0] if paragraphs else "")
    return match.group(0) if match else (paragraphs[0] if paragraphs else "")


def turn(question: str, answer: str) -> str:
    """One question and its answer, as the chat template renders them."""
    return f"{USER}{question}{END}{ASSISTANT}{answer}{END}"


def chat_about(name: str, kind: str, doc: str, code: str, rng: random.Random) -> list[str]:
    """One or two turns about one documented object; `kind` is module, class or function."""
    sentence = first_sentence(doc)
    if not 15 <= len(sentence) <= 300 or ">>>" in sentence:
        return []
    does = f"What does {name} do?" if kind == "function" else f"What is {name}?"
    turns = [turn(rng.choice((does, does, f"Explain {name}.", f"What is the {kind} {name} for?")), sentence)]
    paragraphs = "\n\n".join(doc.split("\n\n")[:2])
    if len(paragraphs) > len(sentence) + 40 and len(paragraphs) < 900:
        turns.append(turn(rng.choice((f"Tell me more about {name}.", f"Describe {name} in detail.")), paragraphs))
    if 60 < len(code) < 900 and rng.random() < 0.4:
        short = name.rsplit(".", 1)[-1]
        ask = (f"Write a {kind} {short}. {sentence}", f"Show me Python code for {name}.", f"Write {short} in Python.")
        turns.append(turn(rng.choice(ask), f"```python\n{code}\n```"))
    return turns


def documented(tree: ast.Module, module: str, source: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, docstring and (functions only) dedented code of the module, its classes and its functions."""
    lines = source.splitlines()
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
            code = ""
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                code = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
            yield name, kind, ast.get_docstring(node) or "", code
            body = [] if kind == "function" else node.body
            stack += [(f"{name}.{n.name}", n) for n in body if hasattr(n, "name")]


def add_sources(corpus: Corpus, rng: random.Random) -> None:
    """Every .py file of the library as code, its docstrings and block comments as English, chats about both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace").expandtabs(8)
        origin, module = relative.as_posix(), ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates of code, kept as such by the library itself
            continue
        corpus.add(origin, "python", source)
        prose, turns = [], []
        for name, kind, doc, code in documented(tree, module, source):
            prose += [doc] if len(doc) > 80 else []
            turns += chat_about(name, kind, doc, code, rng) if doc else []
        comments = re.findall(r"(?m)(?:^[ ]*#[ ].*\n){2,}", source)
        prose += [re.sub(r"(?m)^[ ]*#[ ]?", "", block) for block in comments]
        corpus.add(origin, "english", "\n\n".join(text.strip("\n") for text in prose))
        for i in range(0, len(turns), 3):
            corpus.add(origin, "chat", "".join(turns[i : i + 3]))
    for path in sorted(root.glob("LICENSE.txt")) + sorted(root.glob("idlelib/*.txt")):
        corpus.add(path.name, "english", path.read_text(encoding="utf-8", errors="replace"))


def add_builtins(corpus: Corpus, rng: random.Random) -> None:
    """Documentation strings of the modules written in C, which have no source to read."""
    seen: set[str] = set()
    for module_name in sorted(sys.stdlib_module_names):
        spec = None if "test" in module_name else importlib.util.find_spec(module_name)
        if spec is None or not (spec.origin == "built-in" or str(spec.origin).endswith((".so", ".pyd"))):
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # an optional module of which the library was not installed
            continue
        prose, turns = [], []
        owners = [(module_name, module)] + [
            (f"{module_name}.{k}", v) for k, v in inspect.getmembers(module, inspect.isclass)
        ]
        for owner_name, owner in owners:
            for key, member in [("", owner), *sorted(vars(owner).items(), key=lambda kv: kv[0])]:
                doc = inspect.cleandoc(member.__doc__) if isinstance(getattr(member, "__doc__", None), str) else ""
                if len(doc) < 40 or doc in seen or (key and not callable(member)):
                    continue
                seen.add(doc)
                name = f"{owner_name}.{key}".rstrip(".").removeprefix("builtins.")
                kind = "module" if member is module else "class" if inspect.isclass(member) else "function"
                prose.append(doc)
                turns += chat_about(name, kind, doc, "", rng)
        corpus.add(module_name, "english", "\n\n".join(prose))
        for i in range(0, len(turns), 3):
            corpus.add(module_name, "chat", "".join(turns[i : i + 3]))


def add_topics(corpus: Corpus) -> None:
    """The language reference that `help()` shows, by topic."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        corpus.add(name, "english", text)
        paragraphs = [p.strip() for p in text.split("\n\n") if len(p.strip()) > 60 and "::=" not in p and "**" not in p]
        if paragraphs and len(paragraphs[0]) < 700:
            answer = " ".join(paragraphs[0].split())
            corpus.add(name, "chat", turn(f"Explain {name.replace('-', ' ')} in Python.", answer))


def add_small_talk(corpus: Corpus) -> None:
    """A few turns in which the model says what it is, repeated so that they are learnt."""
    who = "I am Shoal's demo model, a very small language model trained on the Python standard library."
    help_ = "You can ask me about a Python module, a class or a function. I am small, so please check what I say."
    pairs = [
        *((hello, f"Hello! {help_}") for hello in ("Hello", "Hello!", "Hi", "Hi!", "Hey there!", "Good morning!")),
        *((ask, who) for ask in ("Who are you?", "What are you?", "Who made you?", "What is your name?")),
        *((ask, help_) for ask in ("What can you do?", "Can you help me?", "Help!")),
        *((thanks, "You are welcome!") for thanks in ("Thank you", "Thanks!", "Thank you very much.")),
    ]
    for i in range(20 * len(pairs)):
        q, a = pairs[i % len(pairs)]
        corpus.add(f"talk {i}", "chat", turn(q, a))


def build_corpus(seed: int) -> Corpus:
    """All text of this machine's standard library; `seed` chooses how the chats ask. Takes some ten seconds."""
    corpus, rng = Corpus(), random.Random(seed)
    add_sources(corpus, rng)
    add_builtins(corpus, rng)
    add_topics(corpus)
    add_small_talk(corpus)
    return corpus


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips; a text begins with <|endoftext|>, as every document in training does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for kind in ("python", "english") for text in corpus.train[kind])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B", special_tokens=[(EOT, 0)]
    )
    return tokenizer
