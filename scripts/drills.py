"""The full fault and load drills, one command each; `--scale 0.05` makes a small one of it.

    python scripts/drills.py kills-tp2-dp2            # 100 kills under 32 streams, tensor 2 x data 2
    python scripts/drills.py all --scale 0.03         # every drill, small

    kills-tp2-dp2, kills-pp2-dp2   100 worker kills, each hitting a decoding stream, under 32 streams, two replicas
    stops                          20 ranks stopped by SIGSTOP, tensor 2 x data 2
    single                         20 kills on a single replica of tensor 2: streams wait for the rebuilt one
    batch                          `shoal batch` killed 10 times over 500 lines, compared with one clean run
    overload                       60 s at ten times capacity: refusals, accepted requests' TTFT, and 5 s after
    disconnects                    1,000 clients that hang up: blocks free, other streams unchanged
    endurance                      30 minutes of load with faults: memory, threads, descriptors, shared memory

and over Ray, on hosts made of network namespaces (needs root, iproute2 and the dev extras), which `all` leaves out:

    ray-kills-tp2-dp2, ray-kills-pp2-dp2   100 worker kills under 32 streams; a host for each replica, for each rank
    ray-stops                              20 SIGSTOPs, a host for each of two replicas
    node-loss, node-loss-pp2-dp2           5 nodes lost, killed or cut off in turns; a host for each replica, each rank

Reports go to docs/benchmarks/drill_<name>.json with seed and commit. All run the demo model in float32 with
deterministic = true. Exit status 1 when a drill did not show what it is for.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from shoal.configs.loader import load_config
from shoal.configs.sampling import SamplingParams
from shoal.engine.client import EngineClient, QueueFull
from shoal.engine.messages import Request
from shoal.launcher.bench_report import percentile
from shoal.launcher.chaos_report import commit_of
from shoal.launcher.cli import main as shoal
from shoal.launcher.controller import Controller
from shoal.launcher.session import Session, keep_heap, open_session

ROOT = Path(__file__).resolve().parents[1]
LIMITS = ["--deterministic", "--num-blocks", "1024", "--max-model-len", "512"]
KEYWORDS = {"model": "demo", "deterministic": True, "num_blocks": 1024, "max_model_len": 512}


MAX_QUEUE_WAIT_S = 0.001  # of an accepted request for its turn: where a first token takes 3 ms, the bound is twice that


def chaos(layout: list[str], options: list[str], seed: int, out: Path) -> bool:
    """One `shoal chaos`."""
    return shoal(["chaos", "demo", *layout, *LIMITS, "--seed", str(seed), *options, "--json", str(out)]) == 0


def times(count: float, scale: float, least: int = 2) -> int:
    """A scaled count."""
    return max(least, round(count * scale))


def kills(layout: list[str]) -> Callable[[float, int, Path], bool]:
    """100 worker kills under 32 streams."""

    def drill(scale: float, seed: int, out: Path) -> bool:
        options = ["--count", str(times(100, scale)), "--pause", "1", "--faults", "kill-rank"]
        return chaos(layout, [*options, "--streams", str(times(32, max(scale, 0.25)))], seed, out)

    return drill


def stops(scale: float, seed: int, out: Path) -> bool:
    """20 SIGSTOPs."""
    options = ["--count", str(times(20, scale)), "--pause", "1", "--faults", "stop-rank", "--streams", "8"]
    return chaos(["-tp", "2", "-dp", "2"], options, seed, out)


def single(scale: float, seed: int, out: Path) -> bool:
    """A replica alone."""
    options = ["--count", str(times(20, scale)), "--pause", "1", "--faults", "kill-rank,kill-engine", "--streams", "8"]
    return chaos(["-tp", "2"], options, seed, out)


def over_ray(layout: list[str], cpus: list[int], faults: str, count: int) -> Callable[[float, int, Path], bool]:
    """A drill on a Ray cluster of rehearsed hosts."""

    def drill(scale: float, seed: int, out: Path) -> bool:
        sys.path.insert(0, str(ROOT))  # the hosts are made as tests make them
        from tests.cluster.ray_chaos import chaos_over_ray

        load = ["--count", str(times(count, scale, 1)), "--pause", "1", "--faults", faults, "--seed", str(seed)]
        return chaos_over_ray(cpus, [*layout, *load, "--streams", str(times(32, max(scale, 0.25)))], out)

    return drill


def endurance(scale: float, seed: int, out: Path) -> bool:
    """Load with faults for long; memory and the like after the first quarter against the end."""
    options = ["--minutes", str(30 * scale), "--pause", "20", "--streams", "16"]
    passed = chaos(["-tp", "2", "-dp", "2"], options, seed, out)
    samples = [sample["vitals"] for sample in json.loads(out.read_text())["samples"]]
    for name in ("memory_bytes", "threads", "descriptors", "shm_files"):
        early = statistics.median(sample[name] for sample in samples[: max(1, len(samples) // 4)])
        late = statistics.median(sample[name] for sample in samples[-max(1, len(samples) // 4) :])
        print(f"{name}: {early:.0f} in the first quarter, {late:.0f} in the last")
        passed &= late <= 1.1 * early + 2
    return passed


def batch(scale: float, seed: int, out: Path) -> bool:
    """Killed again and again, compared with one clean run."""
    choose, wanted_kills, count = random.Random(seed), times(10, scale), times(500, scale, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [_line(number, choose) for number in range(count)]
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        base = [sys.executable, "-m", "shoal", "batch", str(folder / "in.jsonl"), "demo", "-dp", "2", *LIMITS]
        base += ["--max-num-seqs", "8", "--max-queued-requests", "8"]
        subprocess.run([*base, "-o", str(folder / "clean.jsonl")], check=True, cwd=ROOT)
        target, done = folder / "killed.jsonl", 0
        while done < wanted_kills:
            have = len(target.read_bytes().splitlines()) if target.exists() else 0
            process = subprocess.Popen([*base, "-o", str(target)], cwd=ROOT, stderr=subprocess.DEVNULL)
            goal = have + choose.randint(1, max(1, (count - have) // (2 * (wanted_kills - done))))
            while process.poll() is None and (not target.exists() or len(target.read_bytes().splitlines()) < goal):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            done += process.wait() == -signal.SIGKILL
        subprocess.run([*base, "-o", str(target)], check=True, cwd=ROOT)
        clean, killed = (_answers(folder / each) for each in ("clean.jsonl", "killed.jsonl"))
    report = {"lines": count, "kills": done, "answers": len(killed), "equal": clean == killed}
    return _write(out, seed, report, clean == killed and len(killed) == count)


def _line(number: int, choose: random.Random) -> dict[str, Any]:
    prompt = [choose.randrange(500) for _ in range(choose.randint(2, 40))]
    body = {"prompt": prompt, "max_tokens": choose.randint(4, 40), "temperature": choose.choice((0, 1.0))}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def _answers(path: Path) -> dict[str, Any]:
    """Choices by id; fails when one is there twice."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        assert answer["custom_id"] not in found, "a line was answered twice"
        found[answer["custom_id"]] = answer["response"]["body"]["choices"]
    return found


async def _ttft(client: EngineClient, request: Request) -> float:
    """Seconds to the first token; the request runs to its end. Raises QueueFull."""
    sent, first = time.monotonic(), 0.0
    async for delta in client.submit(request):
        if delta.token_ids and not first:
            first = time.monotonic() - sent
        assert delta.finish_reason != "error", delta.error
    return first


def _request(number: int, max_tokens: int = 24) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=number)
    prompt = [(7 * number + index) % 500 for index in range(16)]
    return Request(request_id=f"drill-{number}", prompt_token_ids=prompt, sampling=sampling)


async def _open_loop(client: EngineClient, rate: float, seconds: float, first: int) -> dict[str, list[float]]:
    """Requests at a steady rate, whatever becomes of them: TTFT of the accepted, and how long each refusal took."""
    ttft: list[float] = []
    refusals: list[float] = []

    async def send(number: int) -> None:
        sent = time.monotonic()
        try:
            ttft.append(await _ttft(client, _request(number)))
        except QueueFull:
            refusals.append(time.monotonic() - sent)

    tasks, start = set(), time.monotonic()  # those that run: a heap that grows would make the collector slow
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        task = asyncio.create_task(send(first + number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return {"ttft_s": ttft, "refusal_s": refusals}


def overload(scale: float, seed: int, out: Path) -> bool:
    """Ten times what the fleet can do."""
    limits = {"max_num_seqs": 4, "max_queue_wait_s": MAX_QUEUE_WAIT_S, "max_num_batched_tokens": 64}
    report = asyncio.run(_overload(scale, {**KEYWORDS, **limits, "data_parallel_size": 2, "seed": seed}))
    calm, load, after = report["unloaded_ttft_p99_ms"], report["accepted_ttft_p99_ms"], report["after_ttft_p99_ms"]
    passed = report["refusal_p50_ms"] <= 50 and load <= 2 * calm and after <= 2 * calm
    return _write(out, seed, report, passed)


async def _overload(scale: float, keywords: dict[str, Any]) -> dict[str, Any]:
    session = await open_session(load_config(keywords=keywords))
    client = session.front_end.client
    keep_heap()  # as commands do
    try:
        await asyncio.gather(*(_ttft(client, _request(number)) for number in range(8)))  # warm
        started, done = time.monotonic(), 0
        while time.monotonic() - started < max(2.0, 10 * scale):
            await asyncio.gather(*(_ttft(client, _request(1000 + done + number)) for number in range(8)))
            done += 8
        capacity = done / (time.monotonic() - started)
        calm = await _open_loop(client, capacity / 4, max(5.0, 20 * scale), 100_000)
        load = await _open_loop(client, 10 * capacity, max(5.0, 60 * scale), 200_000)
        await asyncio.sleep(0.5)
        after = await _open_loop(client, capacity / 4, 5.0, 900_000)
    finally:
        await session.close()
    return {
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(10 * capacity, 1),
        "accepted": len(load["ttft_s"]),
        "refused": len(load["refusal_s"]),
        "refusal_p50_ms": _ms(load["refusal_s"], 50),
        "refusal_p99_ms": _ms(load["refusal_s"], 99),
        "unloaded_ttft_p50_ms": _ms(calm["ttft_s"], 50),
        "unloaded_ttft_p99_ms": _ms(calm["ttft_s"], 99),
        "accepted_ttft_p50_ms": _ms(load["ttft_s"], 50),
        "accepted_ttft_p99_ms": _ms(load["ttft_s"], 99),
        "after_ttft_p99_ms": _ms(after["ttft_s"], 99),
        "after_refused": len(after["refusal_s"]),
    }


def _ms(values: list[float], percent: float) -> float:
    return round(1e3 * percentile(values, percent), 2)


def disconnects(scale: float, seed: int, out: Path) -> bool:
    """Clients that hang up while others are served."""
    keywords = {**KEYWORDS, "data_parallel_size": 2, "max_num_seqs": 32, "seed": seed}
    report = asyncio.run(_disconnects(times(1000, scale), keywords))
    return _write(out, seed, report, report["others_unchanged"] and report["slowest_free_s"] <= 1.0)


async def _disconnects(count: int, keywords: dict[str, Any]) -> dict[str, Any]:
    session = await open_session(load_config(keywords=keywords))
    client = session.front_end.client
    steady = [_request(number, 200) for number in range(4)]
    stopping, unchanged, runs = asyncio.Event(), True, 0
    try:
        alone = [await _tokens(client, request) for request in steady]

        async def keep(which: int) -> None:
            nonlocal unchanged, runs
            while not stopping.is_set():
                unchanged &= await _tokens(client, steady[which]) == alone[which]
                runs += 1

        readers = [asyncio.create_task(keep(which)) for which in range(4)]
        freed = []
        for number in range(count):
            stream = client.submit(_request(10_000 + number, 400))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            if number % 50 == 49 or number == count - 1:
                freed.append(await _until_only(session, 4))
        stopping.set()
        await asyncio.gather(*readers)
        idle = await _until_only(session, 0)
    finally:
        await session.close()
    return {
        "disconnects": count,
        "slowest_free_s": round(max([*freed, idle]), 3),
        "others_unchanged": unchanged,
        "other_runs": runs,
    }


async def _tokens(client: EngineClient, request: Request) -> list[int]:
    return [token for delta in [delta async for delta in client.submit(request)] for token in delta.token_ids]


async def _until_only(session: Session, streams: int) -> float:
    """Seconds until no more than so many requests hold blocks (or 10)."""
    client = session.front_end.client
    assert isinstance(client, Controller)
    started = time.monotonic()
    while time.monotonic() - started < 10.0:
        stats = await client.stats()
        left = sum(each.num_running + each.num_waiting for each in stats)
        if left <= streams and (streams or not any(any(each.referenced_blocks) for each in stats)):
            break
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def _write(out: Path, seed: int, report: dict[str, Any], passed: bool) -> bool:
    record = {"seed": seed, "commit": commit_of(ROOT), **report, "passed": passed}
    out.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    print(json.dumps(record))
    return passed


DRILLS: dict[str, Callable[[float, int, Path], bool]] = {
    "kills-tp2-dp2": kills(["-tp", "2", "-dp", "2"]),
    "kills-pp2-dp2": kills(["-pp", "2", "-dp", "2", "--micro-batches", "2"]),
    "stops": stops,
    "single": single,
    "batch": batch,
    "overload": overload,
    "disconnects": disconnects,
    "endurance": endurance,
}
TP2_DP2, PP2_DP2 = ["-tp", "2", "-dp", "2"], ["-pp", "2", "-dp", "2"]
RAY_DRILLS: dict[str, Callable[[float, int, Path], bool]] = {
    "ray-kills-tp2-dp2": over_ray(TP2_DP2, [0, 2, 2], "kill-rank", 100),
    "ray-kills-pp2-dp2": over_ray(PP2_DP2, [1, 1, 1, 1], "kill-rank", 100),
    "ray-stops": over_ray(TP2_DP2, [0, 2, 2], "stop-rank", 20),
    "node-loss": over_ray(TP2_DP2, [0, 2, 2, 2], "lose-host", 5),
    "node-loss-pp2-dp2": over_ray(PP2_DP2, [0, 1, 1, 1, 1, 1], "lose-host", 5),
}


def main() -> int:
    """Run one drill, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=[*DRILLS, *RAY_DRILLS, "all"])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the reports")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # before a drill of minutes, not after it
    names = list(DRILLS) if args.drill == "all" else [args.drill]
    failed = []
    for name in names:
        print(f"--- {name}, scale {args.scale:g}", flush=True)
        if not {**DRILLS, **RAY_DRILLS}[name](args.scale, args.seed, args.out / f"drill_{name}.json"):
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
