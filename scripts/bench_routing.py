"""Routing policies compared on a workload of shared prefixes: in virtual time at 64 replicas, and for real at 2.

    python scripts/bench_routing.py                       # virtual time; writes docs/benchmarks/routing.{json,png}
    python scripts/bench_routing.py --real demo           # also the demo model on two replicas of one rank, here

The workload: conversations that begin with one of several system prompts, a few turns each; every turn's prompt holds
the whole conversation so far. Popularity of the system prompts is skewed (Zipf). Conversations begin evenly over time,
at a multiple of the prompt tokens the fleet could compute without any cache. A step of the virtual replicas takes about
what an 8B model on one H100 might take (LATENCY below, not measured); only the ratios between policies are meant.

Hit rate: prompt tokens found in a cache. TTFT: arrival to first token. Imbalance: outstanding tokens of the most loaded
replica over the mean, averaged over arrivals that found any.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from shoal.configs.loader import load_config
from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import CacheConfig, ModelConfig, SchedulerConfig, ShoalConfig
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import BLIND_TOKEN, StepLatency
from shoal.engine.messages import Request
from shoal.launcher.bench_report import percentile
from shoal.launcher.chaos_report import commit_of
from shoal.launcher.fleet_simulation import Fleet
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from shoal.launcher.session import open_session

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks"
LATENCY = StepLatency(base_s=0.008, row_s=0.00002, token_s=0.00004)  # about 25,000 prompt tokens/s, 120 steps/s
BLOCK_SIZE, NUM_BLOCKS, VOCABULARY = 16, 6000, 32000
POLICIES = ("round_robin", "least_loaded", "prefix")


def make_policy(name: str, load_factor: float) -> Routing:
    """A policy by its setting's name."""
    if name == "prefix":
        return PrefixRouting(BLOCK_SIZE, load_factor)
    return RoundRobin() if name == "round_robin" else LeastLoaded()


def workload(
    seed: int, conversations: int, rate: float, scale: float, vocabulary: int, num_systems: int
) -> list[Request]:
    """Turns of conversations in the order of their arrival. rate: turns a second. scale: of all lengths. num_systems:
    different system prompts.
    """
    choose = random.Random(f"routing {seed}")

    def tokens(count: float) -> list[int]:
        return [choose.randrange(vocabulary) for _ in range(max(1, int(count * scale)))]

    systems = [tokens(choose.uniform(500, 2500)) for _ in range(num_systems)]
    weights = [1 / (rank + 1) for rank in range(len(systems))]
    turns = []
    span_s = 3.0 * conversations / rate
    for number in range(conversations):
        history = list(choose.choices(systems, weights)[0])
        moment = choose.uniform(0.0, span_s)
        for turn in range(choose.randint(1, 5)):
            history = history + tokens(choose.uniform(20, 300))
            output = max(1, int(choose.uniform(30, 300) * scale))
            sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, seed=1)
            name = f"c{number}-{turn}"
            turns.append(Request(request_id=name, prompt_token_ids=history, sampling=sampling, arrival=moment))
            history = history + [BLIND_TOKEN] * output  # what virtual replicas answer
            moment += choose.expovariate(1 / 20.0)
    return sorted(turns, key=lambda request: request.arrival)


def simulate(name: str, arrivals: list[Request], replicas: int, load_factor: float) -> dict[str, Any]:
    """One policy in virtual time."""
    config = ShoalConfig(
        model=ModelConfig(max_model_len=16384),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048),
    )
    capacity = Capacity(
        block_size=BLOCK_SIZE,
        groups=[CacheGroup(name="full", window=None, num_blocks=NUM_BLOCKS)],
        max_model_len=16384,
        vocab_size=VOCABULARY,
    )
    fleet = Fleet(replicas, config, capacity, LATENCY, make_policy(name, load_factor))
    started = time.perf_counter()
    fleet.run(arrivals)
    return {**summary(arrivals, fleet), "simulated_in_s": round(time.perf_counter() - started, 1)}


def summary(arrivals: list[Request], fleet: Fleet) -> dict[str, Any]:
    """What is compared."""
    prompts = sum(len(request.prompt_token_ids) for request in arrivals)
    ttft = [done.ttft_s for done in fleet.requests.values()]
    ratios = [max(loads) / statistics.mean(loads) for loads in fleet.loads if sum(loads)]
    return {
        "requests": len(arrivals),
        "hit_rate": round(sum(done.cached_tokens for done in fleet.requests.values()) / prompts, 4),
        "ttft_ms": {f"p{p}": round(1e3 * percentile(ttft, p), 1) for p in (50, 90, 99)},
        "imbalance": round(statistics.mean(ratios), 2),
        "ttft_ms_by_percent": [round(1e3 * percentile(ttft, p), 1) for p in range(101)],
    }


async def measure(name: str, model: str, arrivals: list[Request], speed: float) -> dict[str, Any]:
    """One policy for real, on two replicas of one rank each."""
    keywords = {
        "model": model,
        "data_parallel_size": 2,
        "routing": name,
        "num_blocks": 2048,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
    }
    session = await open_session(load_config(keywords=keywords))
    client = session.front_end.client
    done: dict[str, tuple[float, int]] = {}
    ratios: list[float] = []

    async def send(request: Request) -> None:
        await asyncio.sleep(max(0.0, start + request.arrival / speed - time.monotonic()))
        loads = [replica.outstanding_tokens for replica in (await client.status()).replicas]  # type: ignore[attr-defined]
        if sum(loads):
            ratios.append(max(loads) / statistics.mean(loads))
        sent = time.monotonic()
        async for delta in client.submit(request):
            if delta.start == 0 and delta.token_ids:
                done[request.request_id] = (time.monotonic() - sent, delta.num_cached_tokens)

    try:
        start = time.monotonic()
        await asyncio.gather(*(send(request) for request in arrivals))
    finally:
        await session.close()
    ttft = [seconds for seconds, _ in done.values()]
    prompts = sum(len(request.prompt_token_ids) for request in arrivals)
    return {
        "requests": len(arrivals),
        "hit_rate": round(sum(cached for _, cached in done.values()) / prompts, 4),
        "ttft_ms": {f"p{p}": round(1e3 * percentile(ttft, p), 1) for p in (50, 90, 99)},
        "imbalance": round(statistics.mean(ratios), 2) if ratios else None,
        "ttft_ms_by_percent": [round(1e3 * percentile(ttft, p), 1) for p in range(101)],
    }


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """What a line of output holds."""
    return {name: value for name, value in found.items() if name != "ttft_ms_by_percent"}


def plot(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Hit rate, TTFT and imbalance of every policy. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 3, squeeze=False)
    for (title, policies), (left, middle, right) in zip(results.items(), grid, strict=True):
        names = list(policies)
        left.bar(names, [100 * policies[name]["hit_rate"] for name in names], color="tab:blue")
        left.set(ylabel="prompt tokens from a cache (%)", title=title)
        for name in names:
            middle.plot(policies[name]["ttft_ms_by_percent"], [percent / 100 for percent in range(101)], label=name)
        middle.set(xscale="log", xlabel="TTFT (ms)", ylabel="share of requests")
        middle.grid(alpha=0.3)
        middle.legend()
        right.bar(names, [policies[name]["imbalance"] or 0.0 for name in names], color="tab:gray")
        right.set(ylabel="most loaded / mean (outstanding tokens)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print a line per policy, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=1200)
    parser.add_argument("--utilisation", type=float, default=5.0, help="of what the fleet computes without a cache")
    parser.add_argument("--load-factor", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--real", metavar="MODEL")
    parser.add_argument("--real-conversations", type=int, default=40)
    parser.add_argument("--real-seconds", type=float, default=40.0, help="over which their turns arrive")
    parser.add_argument("--out", type=Path, default=OUT / "routing")
    parser.add_argument("--only", choices=("virtual", "real"), help="the other part is taken from the last report")
    args = parser.parse_args()
    report = args.out.with_suffix(".json")
    results = json.loads(report.read_text())["results"] if args.only else {}
    if args.only != "real":
        results["virtual"] = run_virtual(args)
    if args.real:
        results["real"] = run_real(args)
    titles = {"virtual": f"{args.replicas} replicas, virtual time", "real": "2 replicas of one rank, real time"}
    plot({titles[kind]: results[kind] for kind in titles if kind in results}, args.out.with_suffix(".png"))
    record = {"seed": args.seed, "commit": commit_of(ROOT), "load_factor": args.load_factor, "results": results}
    report.write_text(json.dumps(record) + "\n")


def run_virtual(args: argparse.Namespace) -> dict[str, Any]:
    """Every policy at `replicas` in virtual time."""
    systems = max(4, args.conversations // 50)
    shape = workload(args.seed, args.conversations, 1.0, 1.0, VOCABULARY, systems)
    tokens = statistics.mean(len(request.prompt_token_ids) for request in shape)
    rate = args.utilisation * args.replicas / (tokens * LATENCY.token_s)
    arrivals = workload(args.seed, args.conversations, rate, 1.0, VOCABULARY, systems)
    found = {}
    for name in POLICIES:
        found[name] = simulate(name, arrivals, args.replicas, args.load_factor)
        print(f"{args.replicas} virtual, {name}:", shown(found[name]), flush=True)
    return found


def run_real(args: argparse.Namespace) -> dict[str, Any]:
    """Every policy on two replicas of one rank."""
    few = workload(args.seed, args.real_conversations, 1.0, 0.25, 500, args.real_conversations // 2)
    found = {}
    for name in POLICIES:
        found[name] = asyncio.run(measure(name, args.real, few, few[-1].arrival / args.real_seconds))
        print(f"2 real, {name}:", shown(found[name]), flush=True)
    return found


if __name__ == "__main__":
    main()
