"""Train Shoal's demo model, a 3M-parameter Llama, on the Python standard library of the machine it runs on.

    python scripts/train_demo.py --minutes 72                      # on one CPU core
    python scripts/train_demo.py --steps 20 --output /tmp/demo     # a smoke test; with --steps a run can be repeated

Text and tokenizer come from demo_text.py, the model (exactly `LlamaForCausalLM`) from demo_model.py, both beside this
file. Optimiser: Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon) for the matrices, AdamW for the embedding
and the norms. The learning rate and the length of the rows follow the fraction of the budget that is used, so any
budget, in minutes or in steps, is a whole schedule.

The output folder gets the best model so far at every fifth of the budget, and once more when it ends or Ctrl-C or
SIGTERM ends the run: stop it whenever you like. Needs torch, tokenizers and safetensors; nothing of Shoal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from demo_card import README, hardware, read_history
from demo_model import CONFIG, Llama, summed_loss
from demo_text import ASSISTANT, CHAT_TEMPLATE, END, EOT, KINDS, SPECIAL, USER, Corpus, build_corpus, train_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

# Shape suffixes: B rows of a batch, T tokens in a row, N tokens in a line.
TOKENS_PER_STEP, TOKENS_AT_ONCE = 4096, 2048  # small pieces keep the activations in the cache
ROW_LENGTHS = ((0.0, 256), (0.5, 512), (0.85, 1024))  # tokens in a row from this fraction of the budget on
EVALUATE_EVERY = 0.2  # of the budget
PROMPTS = ("def read_lines(path):\n", "The with statement is used to", "class Stack:\n    def __init__(self):\n")
QUESTIONS = ("What does os.path.join do?", "Who are you?")
FIXED_TEXT_LIMIT = 3.2  # nats per token on the text in tests/shoal/test_demo.py


class Muon:
    """Momentum whose update is orthogonalised by five Newton-Schulz steps; matrices of one shape go together."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.velocities = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp_(velocity, self.momentum)
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if tall else x
            scale = max(1.0, x.shape[1] / x.shape[2]) ** 0.5
            for p, update in zip(group, x, strict=True):
                p.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * scale)


def learning_rate_factor(progress: float) -> float:
    """Warm up over 1 %, hold to 40 %, then fall in a line to nothing at `progress` 1."""
    return min(progress / 0.01 + 0.02, 1.0, max(0.0, (1 - progress) / 0.6))


class Rows:
    """Endless rows `[B, T + 1]`: <|endoftext|>, then T tokens from a line's start; each pass shifts and shuffles."""

    def __init__(self, tokens_N: Tensor, line_starts_N: Tensor, seed: int) -> None:
        self.tokens_N, self.line_starts_N = tokens_N, line_starts_N
        self.generator = torch.Generator().manual_seed(seed)
        self.pending: list[int] = []
        self.length = 0

    def take(self, num_rows: int, length: int) -> Tensor:
        if len(self.pending) < num_rows or length != self.length:
            self.length = length
            phase = int(torch.randint(length, (1,), generator=self.generator))
            starts = torch.arange(phase, len(self.tokens_N) - 2 * length, length)
            self.pending = starts[torch.randperm(len(starts), generator=self.generator)].tolist()
        wanted = torch.tensor([self.pending.pop() for _ in range(num_rows)])
        found = self.line_starts_N[
            torch.searchsorted(self.line_starts_N, wanted).clamp(max=len(self.line_starts_N) - 1)
        ]
        starts = torch.where(found - wanted < length // 2, found, wanted)  # a long line is entered in its middle
        starts = starts.clamp(max=len(self.tokens_N) - length)
        rows = self.tokens_N[starts[:, None] + torch.arange(length)]
        return F.pad(rows, (1, 0), value=CONFIG["bos_token_id"])


# Evaluation and output.


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The documents as one line of token ids, each behind <|endoftext|>."""
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in text.ids])


@contextmanager
def rounded(model: Llama) -> Iterator[None]:
    """Within, the weights have the bfloat16 values that the file holds."""
    exact = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        yield
        for p, value in zip(model.parameters(), exact, strict=True):
            p.copy_(value)


def evaluate(model: Llama, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, tuple[float, float]]:
    """Nats per token and bits per byte on the held-out documents, by kind and for 'all'; rows of the full context."""
    sums: dict[str, tuple[float, int, int]] = {}
    for kind in KINDS:
        tokens_N = encode(tokenizer, corpus.held_out[kind])
        nats = 0.0
        for row in tokens_N.split(CONFIG["max_position_embeddings"]):
            inputs = F.pad(row[:-1], (1, 0), value=CONFIG["bos_token_id"])
            logits = model(inputs[None])[0] @ model.embed_tokens.weight.T
            nats += float(F.cross_entropy(logits, row, reduction="sum"))
        sums[kind] = (nats, len(tokens_N), sum(len(text.encode()) for text in corpus.held_out[kind]))
    total = tuple(sum(column) for column in zip(*sums.values(), strict=True))
    return {k: (nats / n, nats / math.log(2) / size) for k, (nats, n, size) in {**sums, "all": total}.items()}


def sample(model: Llama, tokenizer: Tokenizer, prompt: str, seed: int, max_tokens: int = 90) -> str:
    """A continuation at temperature 0.7, up to <|endoftext|> or <|end|>."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    prompt_len = len(ids)
    stops = (SPECIAL.index(EOT), SPECIAL.index(END))
    while len(ids) < prompt_len + max_tokens and (len(ids) == prompt_len or ids[-1] not in stops):
        logits_V = model(torch.tensor([ids]))[0, -1] @ model.embed_tokens.weight.T
        ids.append(int(torch.multinomial((logits_V / 0.7).softmax(-1), 1, generator=generator)))
    return tokenizer.decode(ids[prompt_len:])


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_model(folder: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """A folder as Hugging Face lays it out; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {
        "bos_token_id": SPECIAL.index(EOT),
        "do_sample": True,
        "eos_token_id": [SPECIAL.index(EOT), SPECIAL.index(END)],
        "temperature": 0.7,
        "top_p": 0.95,
    }
    tokenizer_config = {
        "bos_token": EOT,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOT,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": EOT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"config.json": CONFIG, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config}
    for name, value in files.items():
        write_atomically(folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    weights = {f"model.{name}": p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").chmod(0o644)  # safetensors makes it readable by its owner only
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


# The run.


class Trainer:
    """One training run: text, tokenizer, model, optimisers, and the best evaluation so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.corpus = build_corpus(args.seed)
        earlier: Path | None = args.continue_from
        if earlier is None:
            self.tokenizer = train_tokenizer(self.corpus, CONFIG["vocab_size"])
        else:
            self.tokenizer = Tokenizer.from_file(str(earlier / "tokenizer.json"))
        texts = [text for kind in KINDS for text in self.corpus.train[kind]]
        random.Random(args.seed).shuffle(texts)
        tokens_N = encode(self.tokenizer, texts)
        line_end_V = torch.tensor(
            [
                self.tokenizer.decode([i], skip_special_tokens=False).endswith(("\n", EOT))
                for i in range(CONFIG["vocab_size"])
            ]
        )
        self.rows = Rows(tokens_N, line_end_V[tokens_N].nonzero().flatten() + 1, args.seed)
        self.model = Llama()
        self.history = "" if earlier is None else read_history(earlier)
        if earlier is not None:
            weights = load_file(earlier / "model.safetensors")
            self.model.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and name != "embed_tokens.weight"]
        self.muon = Muon(matrices)
        others = [p for name, p in named.items() if p.ndim == 1 or name == "embed_tokens.weight"]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self.started = time.monotonic()
        self.step, self.best = 0, math.inf
        self.train_loss = math.log(CONFIG["vocab_size"])

    def progress(self) -> float:
        """The fraction of the budget that is used, 0 to 1."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return min(1.0, (time.monotonic() - self.started) / (60 * self.args.minutes))

    def train_step(self, progress: float) -> None:
        length = max(length for since, length in ROW_LENGTHS if progress >= since)
        total = 0.0
        for _ in range(TOKENS_PER_STEP // TOKENS_AT_ONCE):
            loss = summed_loss(self.model, self.rows.take(TOKENS_AT_ONCE // length, length)) / TOKENS_PER_STEP
            loss.backward()
            total += loss.item()
        factor = learning_rate_factor(progress)
        self.muon.step(self.args.matrix_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.args.embedding_lr * factor
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.train_loss += 0.05 * (total - self.train_loss)

    def evaluate(self) -> None:
        """Print the held-out loss and, if it is the best so far, write the model and its README."""
        with rounded(self.model):
            losses = evaluate(self.model, self.tokenizer, self.corpus)
            kinds = " ".join(f"{kind} {nats:.3f}" for kind, (nats, _) in losses.items())
            print(f"held out, nats per token: {kinds}; bits per byte {losses['all'][1]:.4f}", flush=True)
            if losses["all"][0] < self.best:
                self.best = losses["all"][0]
                write_model(self.args.output, self.model, self.tokenizer)
                write_atomically(self.args.output / "README.md", self.readme(losses))

    def readme(self, losses: dict[str, tuple[float, float]]) -> str:
        prompts = [*PROMPTS, *(f"{USER}{question}{END}{ASSISTANT}" for question in QUESTIONS)]
        texts = [f"{prompt}▸{sample(self.model, self.tokenizer, prompt, self.args.seed)}" for prompt in prompts]
        budget = f"--minutes {self.args.minutes:g}" if self.args.steps is None else f"--steps {self.args.steps}"
        tokens = self.step * TOKENS_PER_STEP
        return README.format(
            parameters=sum(p.numel() for p in self.model.parameters()),
            heads=CONFIG["num_attention_heads"],
            kv_heads=CONFIG["num_key_value_heads"],
            layers=CONFIG["num_hidden_layers"],
            vocab=CONFIG["vocab_size"],
            context=CONFIG["max_position_embeddings"],
            megabytes=(self.args.output / "model.safetensors").stat().st_size / 1e6,
            losses="\n".join(f"| {kind} | {nats:.3f} | {bits:.3f} |" for kind, (nats, bits) in losses.items()),
            limit=FIXED_TEXT_LIMIT,
            history=self.history,
            command=f"python scripts/train_demo.py {budget} --seed {self.args.seed}{self.options()}",
            seconds=time.monotonic() - self.started,
            steps=self.step,
            tokens=tokens / 1e6,
            epochs=tokens / len(self.rows.tokens_N),
            hardware=hardware(),
            python=platform.python_version(),
            torch=torch.__version__,
            seed=self.args.seed,
            samples="\n\n".join(f"```text\n{text}\n```" for text in (t.replace("```", "'''").strip() for t in texts)),
        )

    def options(self) -> str:
        """The rest of the command: what a run that continues another was told."""
        if self.args.continue_from is None:
            return ""
        rates = f"--matrix-lr {self.args.matrix_lr:g} --embedding-lr {self.args.embedding_lr:g}"
        return f" --continue-from {self.args.continue_from} {rates}"

    def run(self) -> None:
        print(f"{len(self.rows.tokens_N):,} training tokens in one pass", flush=True)
        next_report, next_evaluation = 0.0, EVALUATE_EVERY
        try:
            while (progress := self.progress()) < 1:
                if progress >= next_evaluation:
                    self.evaluate()
                    next_evaluation += EVALUATE_EVERY
                self.train_step(progress)
                if progress >= next_report:
                    elapsed = time.monotonic() - self.started
                    rate = f"{self.step * TOKENS_PER_STEP / elapsed:.0f} tokens/s"
                    print(
                        f"{progress:6.1%} step {self.step} loss {self.train_loss:.3f} {rate} {elapsed:.0f} s",
                        flush=True,
                    )
                    next_report = progress + 0.005
        except KeyboardInterrupt:
            print("interrupted: evaluating what there is", file=sys.stderr)
        self.evaluate()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=72.0, help="wall-clock budget of training (default: 72)")
    budget.add_argument("--steps", type=int, help=f"budget in steps of {TOKENS_PER_STEP} tokens instead: repeatable")
    default = Path(__file__).resolve().parent.parent / "shoal" / "demo"
    parser.add_argument("--output", type=Path, default=default, help="folder of the model (default: shoal/demo)")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="FOLDER",
        help="begin with the weights and tokenizer of an earlier run; give another --seed and a lower --matrix-lr",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seeds weights, order of text, chats and samples (default: 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; more only on an idle machine)")
    parser.add_argument("--matrix-lr", type=float, default=0.025, help="peak learning rate of Muon (default: 0.025)")
    parser.add_argument(
        "--embedding-lr", type=float, default=0.008, help="peak learning rate of AdamW (default: 0.008)"
    )
    args = parser.parse_args()
    if (args.steps is not None and args.steps < 1) or args.minutes <= 0 or args.threads < 1:
        parser.error("--minutes must be more than 0, --steps and --threads at least 1")
    return args


def interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # gradients of improbable tokens: 14 % less time
    signal.signal(signal.SIGTERM, interrupt)
    Trainer(args).run()


if __name__ == "__main__":
    main()
