"""One rank with all threads beside tensor 2 and pipeline 2 on as many: the same token ids, alternating, medians. What a
layout costs where it gains nothing: on one machine's cores.

    python scripts/bench_layouts.py --model PATH --dtype bfloat16 --rounds 3 --json out.json
    python scripts/bench_layouts.py --shape 200m --layouts 1x1 1x2

Layouts are tensor x pipeline, or tensor x pipeline x micro-batches: one where nothing is said, so that stages take
turns with all threads; with two, two stages have a part of the threads each. Workloads: `decode`, one stream of 64
tokens in and 96 out; 16, 32, 64 and 128 requests at once of 64 in and 48 out. Tokens per second are output tokens over
all of the time, prompts included.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from shoal import LLM, SamplingParams
from shoal.configs.model_path import resolve_model_path

sys.path.insert(0, str(Path(__file__).parent))
from bench_peers import SHAPES, make_model

WORKLOADS = {"decode": (1, 64, 96), "16": (16, 64, 48), "32": (32, 64, 48), "64": (64, 64, 48), "128": (128, 64, 48)}
"""Requests, tokens in, tokens out."""


def sizes_of(layout: str) -> tuple[int, int, int]:
    """Tensor and pipeline size and the number of micro-batches. Raises ValueError."""
    tensor, pipeline, *rest = (int(number) for number in layout.split("x"))
    (micro_batches,) = rest or [1]
    if not (tensor >= 1 and 1 <= micro_batches <= pipeline):
        raise ValueError(layout)
    return tensor, pipeline, micro_batches


def run_layout(model: Path, layout: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Output tokens per second of every workload on one layout, started for it."""
    tensor, pipeline, micro_batches = sizes_of(layout)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    rng, found = random.Random(seed), {}
    with LLM(
        str(model), dtype=args.dtype, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline,
        micro_batches=micro_batches, skip_tokenizer_init=True, threads=args.threads // (tensor * micro_batches),
    ) as llm:  # fmt: skip
        for name in args.workloads:
            requests, length, tokens = WORKLOADS[name]
            for count in (8, tokens):  # the first is the warm-up
                prompts = [{"prompt_token_ids": [rng.randrange(vocab) for _ in range(length)]} for _ in range(requests)]
                params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
                started = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                found[name] = requests * count / (time.perf_counter() - started)
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder, or `demo`")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="make a random model of this shape instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    layouts = ["1x1", "2x1", "1x2", "1x2x2"]
    parser.add_argument("--layouts", nargs="+", default=layouts, help="TENSORxPIPELINE[xMICRO_BATCHES]")
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--threads", type=int, default=2, help="of all ranks that work at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rounds here, as they come")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("give either --model or --shape")
    for layout in args.layouts:
        try:
            sizes_of(layout)
        except ValueError:
            parser.error(f"--layouts {layout}: TENSORxPIPELINE or TENSORxPIPELINExMICRO_BATCHES, at most one per stage")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ranks and files end with this process
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(args.shape, Path(folder), args.dtype) if args.shape else Path(resolve_model_path(args.model))
        rounds: dict[str, list[dict[str, float]]] = {layout: [] for layout in args.layouts}
        for number in range(args.rounds):
            for layout, found in rounds.items():
                found.append(run_layout(model, layout, args, args.seed + number))
                print(f"round {number + 1}, {layout}: {found[-1]}", flush=True)
                if args.json is not None:
                    settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
                    args.json.write_text(json.dumps({"settings": settings, "rounds": rounds}, indent=1) + "\n")
    base = rounds[args.layouts[0]]
    print(f"{'workload':10}" + "".join(f"{layout:>18}" for layout in args.layouts) + "   output tok/s")
    for name in args.workloads:
        medians = [statistics.median(one[name] for one in rounds[layout]) for layout in args.layouts]
        first = statistics.median(one[name] for one in base)
        print(f"{name:10}" + "".join(f"{median:9.1f} ({median / first:4.2f}x)" for median in medians))


if __name__ == "__main__":
    main()
