"""Shoal's int8 and int4 beside its own floats and llama.cpp's Q8_0 and Q4_0.

    python scripts/bench_quantization.py --model DIR --llama-bench BIN --gguf bf16=F.gguf int8=F.gguf int4=F.gguf
    python scripts/bench_quantization.py ... --threads 2

The GGUF files are of the same checkpoint (scripts/write_gguf.py). In every round each engine runs in turn: one stream
(`decode`, tokens per second) and a prompt of --prompt tokens; medians over rounds are printed with their ratio, beside
the bandwidth measured in the same rounds and the bytes of weights a token reads. With one thread in processor time, so
that other work on the machine takes less part in it; with more in time of the clock, on a machine that does nothing
else. What llama-bench spends on loading is subtracted as the difference of a long and a short run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from shoal import LLM, SamplingParams
from shoal.configs.schema import ParallelConfig
from shoal.model.families import load_spec
from shoal.model.memory_estimate import weights_bytes
from shoal.model.shard import shard_model

SHORT, LONG = 8, 40  # tokens of the decode runs: their difference is measured
TIMEOUT_S = 1800.0
KINDS = ("bf16", "int8", "int4")


def seconds(threads: int) -> float:
    """Of this process's processor time with one thread, else of the clock."""
    return time.process_time() if threads == 1 else time.perf_counter()


def shoal_seconds(llm: LLM, prompt: list[int], tokens: int, threads: int) -> float:
    """Seconds of one request."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    request = {"prompt_token_ids": prompt, "cache_salt": str(time.perf_counter_ns())}
    start = seconds(threads)
    llm.generate([request], params, use_tqdm=False)
    return seconds(threads) - start


def llama_seconds(binary: str, file: str, size: list[str], threads: int) -> float:
    """Seconds of a llama-bench process, without its own warm-up run."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [binary, "-m", file, "-t", str(threads), "-r", "1", "--no-warmup", *size]
    subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)
    after, elapsed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    return elapsed if threads > 1 else after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_rate(memory: torch.Tensor, threads: int) -> float:
    """Bytes per second that reading memory gives. In a thread that ends (see launcher/machine.py)."""

    def read() -> float:
        memory.sum()  # wakes the threads
        start = seconds(threads)
        memory.sum()
        return memory.nbytes / (seconds(threads) - start)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(read).result()


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Rates of every round: "shoal int8" -> {"decode": [...], "prompt": [...]}, and "bandwidth"."""
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocab, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    files = dict(entry.split("=", 1) for entry in args.gguf)
    memory = torch.ones(256 << 20)
    found: dict[str, dict[str, list[float]]] = {"bandwidth": {"bytes": []}}
    limits = {"skip_tokenizer_init": True, "threads": args.threads, "max_model_len": args.prompt + LONG}

    def add(name: str, workload: str, rate: float) -> None:
        found.setdefault(name, {}).setdefault(workload, []).append(rate)

    for _ in range(args.rounds):
        for kind in KINDS:
            with LLM(args.model, dtype="bfloat16", quantization="none" if kind == "bf16" else kind, **limits) as llm:
                shoal_seconds(llm, ids, LONG, args.threads)  # warm-up
                long, short = (shoal_seconds(llm, ids[:16], count, args.threads) for count in (LONG, SHORT))
                add(f"shoal {kind}", "decode", (LONG - SHORT) / (long - short))
                add(f"shoal {kind}", "prompt", args.prompt / shoal_seconds(llm, ids, 1, args.threads))
            found["bandwidth"]["bytes"].append(read_rate(memory, args.threads))
            if kind in files:
                runs = [["-p", "0", "-n", str(count)] for count in (LONG, SHORT)]
                runs += [["-n", "0", "-p", str(count)] for count in (args.prompt, 16)]
                long, short, prompt, start = (
                    llama_seconds(args.llama_bench, files[kind], size, args.threads) for size in runs
                )
                add(f"llama.cpp {kind}", "decode", (LONG - SHORT) / (long - short))
                add(f"llama.cpp {kind}", "prompt", (args.prompt - 16) / (prompt - start))
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench")
    parser.add_argument("--gguf", nargs="*", default=[], help="KIND=FILE for bf16, int8, int4")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec, _ = load_spec(args.model)
    found = measure(args)
    bandwidth = statistics.median(found["bandwidth"]["bytes"])
    print(f"{args.threads} thread(s) read {bandwidth / 1e9:.1f} GB/s (median)\n")
    head = ["weights", "read per token", "of bandwidth"]
    head += ["decode tok/s", "llama.cpp", "ratio", "prompt tok/s", "llama.cpp", "ratio"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for kind in KINDS:
        [shard] = shard_model(spec, ParallelConfig(), "none" if kind == "bf16" else kind)
        read = weights_bytes(spec, shard, 2) - (0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size * 2)
        ours, theirs = found[f"shoal {kind}"], found.get(f"llama.cpp {kind}")
        cells = []
        for workload in ("decode", "prompt"):
            mine = statistics.median(ours[workload])
            peer = statistics.median(theirs[workload]) if theirs else None
            cells += [f"{mine:.1f}", f"{peer:.1f}" if peer else "-", f"{mine / peer:.2f}" if peer else "-"]
        share = statistics.median(ours["decode"]) * read / bandwidth
        print(f"| {kind} | {read / 1e6:.0f} MB | {share:.0%} | " + " | ".join(cells) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
