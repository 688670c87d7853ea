"""The demo model's README: what the training script fills in, and what it takes over from an earlier run."""

import platform
from pathlib import Path

import torch

README = """# Shoal's demo model

A Llama of {parameters:,} parameters ({heads} query heads, {kv_heads} KV heads, {layers} layers, byte-level BPE of
{vocab} tokens, context {context}), trained from nothing by `scripts/train_demo.py` on the sources and documentation
strings of the Python {python} standard library. It continues Python and English in their manner and answers short
questions about the library in form; it is far too small to be right. It exists so that
`shoal generate demo` runs a real model on any layout, on any machine, without a download.

`model.safetensors` holds bfloat16 (the file is {megabytes:.1f} MB); config.json says float32, the dtype it was trained
in and is run in with `dtype: auto`. The output layer is the embedding (`tie_word_embeddings`). A text starts with
`<|endoftext|>`, which the tokenizer adds; a chat is `<|user|>...<|end|><|assistant|>...<|end|>`, a system message goes
in front of the user's, and generation stops at `<|endoftext|>` or `<|end|>`.

## Held-out loss

Text never trained on: about 1 % of the files, modules and topics, chosen by a hash of their names. Measured with the
bfloat16 values of the file in rows of {context} tokens. Some of it resembles files that were trained on (`distutils`).

| text | nats per token | bits per byte |
|---|---|---|
{losses}

`tests/shoal/test_demo.py` holds it below {limit} nats per token on a small text of its own.

## How it was made

| | |
|---|---|
{history}| command | `{command}` |
| training | {seconds:.0f} s, {steps} steps, {tokens:.1f} M tokens ({epochs:.1f} passes over the text) |
| hardware | {hardware} |
| versions | Python {python}, torch {torch} |
| seed | {seed} |

The budget is wall-clock time, so what else the machine does decides how many steps fit; with `--steps` instead of
`--minutes` the same machine and versions repeat a run exactly. The text it was trained on carries the Python Software
Foundation License.

## Samples

Temperature 0.7, the first draw for each prompt; the prompt ends at `▸`.

{samples}
"""


def hardware() -> str:
    """The class of this machine's processor and how much of it training uses."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread, float32"


def read_history(folder: Path) -> str:
    """The rows of an earlier run's README that say how it was trained."""
    rows = (folder / "README.md").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(row for row in rows if row.startswith(("| command |", "| training |")))
