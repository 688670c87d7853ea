"""Shoal beside its peers: the same token ids through every engine in one run, alternating, medians, with the machine's
limits.

    python scripts/bench_peers.py --model demo                    # Shoal and transformers on the demo
    python scripts/bench_peers.py --shape 200m --dtype bfloat16 --rounds 5 --json out.json --plot out.png
    python scripts/bench_peers.py --shape 200m --vllm-python PYTHON --llama-cpp FOLDER --gguf-python PYTHON
    python scripts/bench_peers.py --shape 1b --device cuda --dtype bfloat16 --engines shoal shoal-eager transformers

Engines: shoal (shoal-eager: without CUDA graphs; shoal-int8, shoal-int4, shoal-fp8: of weights rounded when loaded),
transformers (static left-padded batches), transformers-cb
(continuous batching with explicit sizes); vLLM when the interpreter given as --vllm-python has it; llama.cpp when the
folder of its programs is given and an interpreter with the gguf package (see peer_llama_cpp.py).
Each engine is a process of its own that stays loaded, is stopped while others run (it may have threads that look for
work) and is warmed up with two short requests; in every round each of them runs the workload once, in turn, and the
medians are compared. On a machine that others use as well, tokens per second of processor time say more than those per
second: both are printed and written, the former from the engine's own process (not for llama.cpp, whose programs do not
tell loading from running). Workloads:

    decode   one stream: 64 tokens in, 128 out, the time of all less that of the first: limited by reading the weights
             once per token
    batch    32 requests, 64 to 256 in, 32 to 96 out
    prompt   4 prompts of 1,024 (or what the context holds), 1 token out: limited by the GEMM rate
    shared   24 requests that share 512 tokens, 32 more of their own, 32 out

The limit of decode, how fast memory is read, and that of prompt, the rate of a matrix product, are measured in every
round beside the engines, and their medians count: on a shared machine both change from minute to minute.
"""

import argparse
import json
import math
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.configs.model_path import resolve_model_path
from shoal.launcher.machine import best_gemm_rate, read_bandwidth

sys.path.insert(0, str(Path(__file__).parent))
from peer_llama_cpp import LlamaCpp

SHAPES = {  # hidden size, layers, query heads, key/value heads, feed-forward, vocabulary
    "tiny": (256, 4, 8, 4, 704, 4096),
    "200m": (1024, 12, 16, 8, 2816, 32000),
    "1b": (2048, 16, 32, 8, 8192, 32000),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "moe": (1024, 8, 16, 4, 384, 32000),
}
EXPERTS, EXPERTS_PER_TOKEN = 32, 4  # of the shape "moe", whose feed-forward is one expert's
REPLY_TIMEOUT_S = 1800.0
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process: its time can be read
ENGINE_SCRIPT = Path(__file__).with_name("peer_engines.py")


class Engine:
    """A loaded engine in a child process, stopped while others run."""

    def __init__(self, name: str, python: str, model: Path, dtype: str, device: str, threads: int) -> None:
        self.name = name
        read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [python, str(ENGINE_SCRIPT), name, str(model), dtype, device, "--reply-fd", str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[write_fd],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **VLLM},
            text=True,
        )
        os.close(write_fd)
        self.replies = os.fdopen(read_fd)
        self.ready_s = self.reply()["ready_s"]

    def reply(self) -> dict[str, float]:
        """The next answer. Raises RuntimeError with the engine's last lines when it ended or is silent for too long."""
        ready, _, _ = select.select([self.replies], [], [], REPLY_TIMEOUT_S)
        line = self.replies.readline() if ready else ""
        if not line:
            self.process.kill()
            assert self.process.stderr is not None
            tail = "\n".join(self.process.stderr.read().splitlines()[-8:])
            raise RuntimeError(f"engine {self.name} ended or was silent for {REPLY_TIMEOUT_S:.0f} s:\n{tail}")
        return json.loads(line)

    def run(self, requests: list[dict[str, Any]]) -> dict[str, float]:
        """Run one workload."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"requests": requests}) + "\n")
        self.process.stdin.flush()
        answer = self.reply()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.replies.close()


def make_model(shape: str, folder: Path, dtype: str, device: str = "cpu") -> Path:
    """A random Llama (or Qwen3-MoE) of the shape, made on the device, saved as a Hugging Face checkpoint. Needs
    transformers.
    """
    import transformers

    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, ffn, vocab = SHAPES[shape]
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "moe_intermediate_size": ffn}
    with torch.device(device):
        if shape == "moe":
            net = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))
        else:
            net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    net.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def workloads(config: dict[str, Any], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The requests of every workload, cut to the model's context."""
    rng, vocab = random.Random(seed), config["vocab_size"]
    context = config.get("max_position_embeddings", 2048)

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(min(count, context - 130))]

    shared = ids(512)
    return {
        "decode": [{"ids": ids(64), "max_tokens": 128}],
        "shared": [{"ids": shared + ids(32), "max_tokens": 32} for _ in range(24)],
        "prompt": [{"ids": ids(1024), "max_tokens": 1} for _ in range(4)],
        "batch": [{"ids": ids(rng.randint(64, 256)), "max_tokens": rng.randint(32, 96)} for _ in range(32)],
    }


Rates = dict[str, dict[str, list[float]]]  # workload -> engine -> tokens per second of every round
Limits = dict[str, list[float]]  # workload -> bytes or FLOP per second of every round


def measure(
    args: argparse.Namespace,
    model: Path,
    engines: list[Engine],
    llama: LlamaCpp | None,
    save: Callable[[Rates, Rates, Limits], None],
) -> tuple[Rates, Rates, Limits]:
    """Prompt tokens per second for `prompt`, output tokens otherwise; the same per second of processor time; and the
    machine's limits.

    save: called with all three after every workload.
    """
    config = json.loads((model / "config.json").read_text())
    found: Rates = {}
    by_processor: Rates = {}
    limits: Limits = {}
    for name, requests in workloads(config, args.seed).items():
        if args.workloads and name not in args.workloads:
            continue
        rates, cpu_rates = found.setdefault(name, {}), by_processor.setdefault(name, {})
        for engine in engines:
            engine.run([{**r, "ids": r["ids"][::-1], "max_tokens": min(r["max_tokens"], 2)} for r in requests[:2]])
        for _ in range(args.rounds):
            if name in LIMITS:
                limits.setdefault(name, []).append(LIMITS[name](torch.device(args.device), getattr(torch, args.dtype)))
                if args.device == "cuda":
                    torch.cuda.empty_cache()  # for the engines
            for engine in engines:
                answer = engine.run(requests)
                if name == "decode":  # what comes after the prompt: all, less the same with one token
                    first = engine.run([{**request, "max_tokens": 1} for request in requests])
                    answer = {key: value - first[key] for key, value in answer.items()}
                tokens = sum(len(r["ids"]) for r in requests) if name == "prompt" else answer["output_tokens"]
                rates.setdefault(engine.name, []).append(tokens / answer["elapsed_s"])
                cpu_rates.setdefault(engine.name, []).append(tokens / answer["cpu_s"])
            rate = None if llama is None else llama.rate(name, requests)
            if rate is not None:
                rates.setdefault(LlamaCpp.name, []).append(rate)
        for what, which in (("second", rates), ("processor second", cpu_rates)):
            line = "  ".join(f"{engine} {statistics.median(values):.1f}" for engine, values in which.items())
            print(f"{name:8} tokens per {what}: {line}", flush=True)
        save(found, by_processor, limits)
    return found, by_processor, limits


LIMITS = {"decode": lambda device, _: read_bandwidth(device), "prompt": best_gemm_rate}


def limit_of(workload: str, weights: int, head: int, itemsize: int, limits: Limits) -> float | None:
    """Tokens per second the machine allows where one limit rules: bandwidth for decode, GEMM rate for prompts, whose
    tokens need no head but for the last. weights: all that a token touches, head included.
    """
    if workload not in limits:
        return None
    each = weights * itemsize if workload == "decode" else 2 * (weights - head)
    return statistics.median(limits[workload]) / each


def table(found: dict[str, dict[str, list[float]]], limits: dict[str, float | None]) -> str:
    """Medians, the ratio of Shoal to each peer, and Shoal's share of the limit, as Markdown."""
    names = list(dict.fromkeys(engine for rates in found.values() for engine in rates))
    lines = ["| workload | " + " | ".join(names) + " | limit | Shoal's share |", "|---" * (len(names) + 3) + "|"]
    for workload, rates in found.items():
        medians = {engine: statistics.median(values) for engine, values in rates.items()}
        own, limit = medians.get("shoal"), limits.get(workload)
        cells = [
            "-" if name not in medians
            else f"{medians[name]:.1f}" + ("" if name == "shoal" or not own else f" ({own / medians[name]:.2f}x)")
            for name in names
        ]  # fmt: skip
        share = f"{own / limit:.0%}" if own and limit else "-"
        lines.append(f"| {workload} | " + " | ".join(cells) + f" | {f'{limit:.0f}' if limit else '-'} | {share} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, list[float]]], limits: dict[str, float | None], path: str, title: str) -> None:
    """Bars per workload, the limit as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.6), layout="constrained")
    for axes, (workload, rates) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        medians = {engine: statistics.median(values) for engine, values in rates.items()}
        axes.bar(
            list(medians), list(medians.values()), color=["#1f6f8b" if e == "shoal" else "#b0b7bd" for e in medians]
        )
        limit = limits.get(workload)
        if limit is not None and limit < 3 * max(medians.values()):
            axes.axhline(limit, color="#c0392b", linestyle="--", linewidth=1)
        axes.set(title=workload, ylabel="tokens/s")
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder, or `demo`")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="make a random Llama of this shape instead")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--engines", nargs="+", default=["shoal", "transformers", "transformers-cb"])
    parser.add_argument("--workloads", nargs="+", choices=["decode", "batch", "prompt", "shared"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM")
    parser.add_argument("--llama-cpp", help="the folder of llama.cpp's llama-bench and llama-batched-bench")
    parser.add_argument("--gguf-python", default=sys.executable, help="an interpreter that has the gguf package")
    parser.add_argument("--json", help="write every round's numbers here")
    parser.add_argument("--plot", help="write a picture here")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("give either --model or --shape")
    return args


def touched_weights(model: Path) -> tuple[int, int]:
    """Weights one token is multiplied with: all of them, less an embedding table that is not the head as well; and how
    many of them are the head.
    """
    names: dict[str, int] = {}
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        names |= {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    untied = "lm_head.weight" in names
    routed = EXPERTS_PER_TOKEN / EXPERTS
    touched = {
        name: size * (routed if ".experts." in name else 1.0)
        for name, size in names.items()
        if not (untied and name.endswith("embed_tokens.weight"))
    }
    head = sum(size for name, size in touched.items() if name.endswith(("lm_head.weight", "embed_tokens.weight")))
    return round(sum(touched.values())), round(head)


def start_engines(args: argparse.Namespace, model: Path) -> list[Engine]:
    """Load every engine; those already loaded are closed when one fails."""
    engines: list[Engine] = []
    names = [(name, sys.executable) for name in args.engines]
    if args.vllm_python:
        names.append(("vllm", args.vllm_python))
    try:
        for name, python in names:
            engines.append(Engine(name, python, model, args.dtype, args.device, args.threads))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    for engine in engines:
        engine.process.send_signal(signal.SIGSTOP)
    print("ready:   " + "  ".join(f"{engine.name} {engine.ready_s:.1f} s" for engine in engines), flush=True)
    return engines


def compare(args: argparse.Namespace, model: Path) -> None:
    """Run the comparison on a checkpoint; print the table, write JSON and picture."""
    engines, llama = start_engines(args, model), None
    place = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    title = f"{args.model or args.shape}, {args.dtype}, {place}"
    ready = {engine.name: engine.ready_s for engine in engines}

    def save(found: Rates, by_processor: Rates, limits: Limits) -> None:
        if args.json:
            read, gemm = limits.get("decode", []), limits.get("prompt", [])
            payload = {"title": title, "limits": {"read_bytes_per_s": read, "gemm_flops_per_s": gemm}, "ready_s": ready}
            payload |= {"tokens_per_s": found, "tokens_per_processor_s": by_processor}
            Path(args.json).write_text(json.dumps(payload, indent=1) + "\n")

    try:
        if args.llama_cpp:
            llama = LlamaCpp(args.llama_cpp, model, args.gguf_python, args.threads)
        found, by_processor, limits = measure(args, model, engines, llama, save)
    finally:
        for engine in [*engines, *([llama] if llama else [])]:
            engine.close()
    itemsize = 4 if args.dtype == "float32" else 2
    bounds = {name: limit_of(name, *touched_weights(model), itemsize, limits) for name in found}
    units = {"decode": "GB/s", "prompt": "GFLOP/s"}
    words = [f"{statistics.median(rates) / 1e9:.1f} {units[name]}" for name, rates in limits.items()]
    print(f"\n{title}; limits: {', '.join(words) or 'none'}\n")
    print(table(found, bounds))
    print("\nper second of processor time:\n\n" + table(by_processor, {}))
    if args.plot:
        plot(found, bounds, args.plot, title)


def main() -> int:
    """Make or find the model, compare."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # engines are stopped: they must be ended
    torch.set_num_threads(args.threads)
    os.environ.pop("GOMP_SPINCOUNT", None)  # importing shoal set it; its engine does so again, the peers have their own
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        if args.shape:
            compare(args, make_model(args.shape, Path(folder), args.dtype, args.device))
        else:
            compare(args, resolve_model_path(args.model, None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
