"""The demo model is a checkpoint like any other: transformers loads it, it has learnt, its tokenizer loses nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "shoal" / "demo"
FIXED_TEXT = '''def count_words(path):
    """Return a dictionary that maps each word in the file to the number of times it occurs."""
    counts = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts


class Queue:
    """A queue in which the first item that was added is the first item to be removed."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def put(self, item):
        self.items.append(item)

    def get(self):
        if not self.items:
            raise IndexError("the queue is empty")
        return self.items.pop(0)


# If the argument is a string, it is the name of a file. The file is opened for reading, and it is closed when the
# function returns. Otherwise the argument must be an object that has a read() method.
'''
UNICODE = (
    "Grüße, 世界! ∑ xᵢ ≤ π",
    "👩‍👩‍👧 family, flag 🇩🇪",
    "tabs\t\tand\r\nline ends\n\n  ",
    "\x00\x7f\ufeff null",
    "",
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((DEMO / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def mean_loss(model: Any, ids: list[int]) -> torch.Tensor:
    """Nats per token `[T - 1]` of every token but the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    config = json.loads((DEMO / "tokenizer_config.json").read_text())

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=config["bos_token"]
    )


def test_folder_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 12_000_000


def test_heads_layers_and_dtype_suit_every_layout(config: dict[str, Any]) -> None:
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 2)
    assert config["num_hidden_layers"] >= 6
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_weights_are_bfloat16_finite_and_tied() -> None:
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors file is not iterable)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert "lm_head.weight" not in tensors


def test_transformers_loads_it_in_float32_with_every_tensor_in_its_place(model: Any) -> None:
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_loss_on_fixed_text_is_below_the_limit_in_its_readme(model: Any, tokenizer: Tokenizer) -> None:
    stated = re.search(r"below ([\d.]+) nats per token", (DEMO / "README.md").read_text())
    assert stated is not None
    assert mean_loss(model, tokenizer.encode(FIXED_TEXT).ids).mean() < float(stated[1])


def test_loss_stays_low_to_the_end_of_the_context(model: Any, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    ids = tokenizer.encode(Path(json.__file__).with_name("decoder.py").read_text()).ids
    context = config["max_position_embeddings"]
    losses = mean_loss(model, ids[:context])
    assert len(losses) == context - 1
    nearby = mean_loss(model, ids[context - 600 : context])  # the same last tokens at low positions
    assert losses[-400:].mean() < nearby[-400:].mean() + 0.2


@pytest.mark.parametrize("text", [*UNICODE, FIXED_TEXT])
def test_tokenizer_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(encoding.ids) == text


def test_tokenizer_in_transformers_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    for text in UNICODE:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    messages = [{"role": "user", "content": "Hello"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render(messages, add_generation_prompt=True)


def test_special_tokens_are_single_ids_and_stop_generation(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    ids = [tokenizer.token_to_id(name) for name in names]
    assert tokenizer.encode("".join(names), add_special_tokens=False).ids == ids
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids[0], ids[3]]
    assert config["bos_token_id"] == ids[0]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_chat_template_renders_turns_and_puts_system_before_the_user() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is json? "},
        {"role": "assistant", "content": "A module."},
        {"role": "user", "content": "Thanks"},
    ]
    first = "<|endoftext|><|user|>Be brief.\n\nWhat is json?<|end|><|assistant|>A module.<|end|>"
    assert render(messages, add_generation_prompt=False) == f"{first}<|user|>Thanks<|end|>"
    assert render(messages, add_generation_prompt=True) == f"{first}<|user|>Thanks<|end|><|assistant|>"


def test_chat_template_drops_no_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    assistant = {"role": "assistant", "content": "Yes."}
    alone = "<|endoftext|><|user|>Be brief.<|end|><|assistant|>"
    assert render([system], add_generation_prompt=True) == alone
    assert render([system, assistant], add_generation_prompt=False) == f"{alone}Yes.<|end|>"


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(ValueError, match="not tool"):
        render([{"role": "tool", "content": "x"}], add_generation_prompt=True)
