"""The jobs of gpu_check.py, each a process of its own; every result is one line of JSON on standard output.

    python scripts/gpu_jobs.py kernels --part 0 --of 8 --seed 7      # the table of kernels/gpu/checks.py
    python scripts/gpu_jobs.py model llama --tp 2                    # a whole tiny model against transformers
    python scripts/gpu_jobs.py graphs                                # steps as CUDA graphs beside eager ones
    python scripts/gpu_jobs.py deterministic gemma2                  # bits of one request, whatever runs beside it
    python scripts/gpu_jobs.py times                                 # the measured cases, one after the other
    python scripts/gpu_jobs.py crossovers                            # ours beside torch's library kernels, over rows
    python scripts/gpu_jobs.py report --part 0 --of 2                # compile for sm_80 and sm_90, no GPU needed

--interpret: on the CPU, through Triton's interpreter, with tiny shapes.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = (80, 90)
WARM_UP_RUNS, TIMED_RUNS = 3, 15
FLUSH_BYTES, FLUSHES = 2**30, 4
"""Written before each timed run: four times 1 GiB keep an H200 busy for about a millisecond."""


def tell(**row: Any) -> None:
    """One result for gpu_check.py."""
    print(json.dumps(row), flush=True)


def chosen_cases(args: argparse.Namespace) -> Iterator[Any]:
    """This part's cases."""
    from shoal.kernels.gpu.checks import all_cases

    cases = [case for case in all_cases(args.scale) if args.only in f"{case.kernel} {case.name}"]
    yield from cases[args.part :: args.of]


def seed_for(args: argparse.Namespace, case: Any) -> None:
    """Inputs depend on the run's seed and the case alone, so that one case can be repeated alone."""
    import torch

    torch.manual_seed(args.seed + zlib.crc32(f"{case.kernel} {case.name}".encode()))


def check_kernels(args: argparse.Namespace) -> None:
    """Every case of the part."""
    import torch

    from shoal.kernels.gpu.checks import judge

    for case in chosen_cases(args):
        started, row = time.perf_counter(), {"check": case.kernel, "name": case.name}
        try:
            seed_for(args, case)
            with torch.inference_mode():
                trial = case.make(torch.device(args.device))
                verdict = judge(trial)
        except Exception as error:  # noqa: BLE001 - reported as a failed check
            tell(**row, ok=False, detail=f"{type(error).__name__}: {error}"[:400])
            continue
        detail = f"error {verdict.error:.2e}, torch {verdict.plain_error:.2e}, limit {verdict.limit:.2e}"
        tell(**row, ok=verdict.passed, detail=detail, error=verdict.error, limit=verdict.limit,
             plain_error=verdict.plain_error, seconds=time.perf_counter() - started)  # fmt: skip


def check_model(args: argparse.Namespace) -> None:
    """A tiny model of one family on one layout: greedy tokens in float32 against transformers; with few-bit weights,
    against transformers on the floats they stand for; with FP8, tokens nearly as good as its best.
    """
    from shoal import LLM, SamplingParams
    from shoal.kernels import device
    from tests.model.rounded import rounded_checkpoint
    from tests.model.tiny_models import VOCAB, load_oracle, make_model
    from tests.parity import check_greedy

    size, rng, stepwise = args.tp * args.pp, random.Random(args.seed), args.name == "llama_dynamic"
    lengths = (5, 12) if args.interpret else (1, 5, 30, 41)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    prompts = [prompt[:30] if stepwise else prompt for prompt in prompts]
    settings: dict[str, Any] = {"max_model_len": 64} if args.name == "phi3_longrope" else {}
    if args.interpret:
        assert size == 1 or args.quantization == "none", "ranks in other processes round activations, as CPUs do"
        device.INTERPRET_CPU_TENSORS = size == 1  # ranks of several are other processes: they run on torch
        settings |= {"device": "cpu", "native": "off"}
    else:
        settings |= {"device": "cuda", "ranks_per_device": size}
    greedy = SamplingParams(temperature=0.0, max_tokens=4 if args.interpret else 12, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(args.name, Path(folder))
        with LLM(
            str(path), dtype="float32", tensor_parallel_size=args.tp, pipeline_parallel_size=args.pp,
            skip_tokenizer_init=True, block_size=4, max_num_batched_tokens=24, max_num_seqs=16,
            quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype, **settings,
        ) as llm:  # fmt: skip
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        if args.quantization in ("int8", "int4"):
            path = rounded_checkpoint(path, Path(folder) / "rounded", args.quantization)
        oracle = load_oracle(path)
    found = [(prompt, output.outputs[0].token_ids) for prompt, output in zip(prompts, outputs, strict=True)]
    kinds = [f"{args.quantization} weights"] if args.quantization != "none" else []
    kinds += [f"{args.kv_cache_dtype} cache"] if args.kv_cache_dtype != "auto" else []
    name = ", ".join([f"{args.name} tp{args.tp} pp{args.pp}", *kinds])
    if "fp8" in (args.quantization, args.kv_cache_dtype):
        worst = max(shortfall(oracle, prompt, ids) for prompt, ids in found)
        detail = f"worst token {worst:.2f} standard deviations below the best logit"
        tell(check="model", name=name, ok=worst < 1.0, detail=detail, error=worst, limit=1.0)
        return
    for prompt, ids in found:
        check_greedy(oracle, prompt, ids, stepwise=stepwise)
    tell(check="model", name=name, ok=True, detail=f"{sum(len(ids) for _, ids in found)} tokens equal")


def shortfall(oracle: Any, prompt: list[int], token_ids: list[int]) -> float:
    """How far the worst of these tokens is below the oracle's best, in standard deviations of the logits."""
    import torch

    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


def check_graphs(args: argparse.Namespace) -> None:
    """Steps as CUDA graphs choose the tokens that steps launched kernel by kernel choose; graphs hold NCCL's
    collectives.
    """
    import torch

    from shoal.model.graph_steps import GraphSteps

    replay, replayed = GraphSteps.replay, []

    def counted(self: GraphSteps, batch: Any, filters: bool, compute: Any) -> None:
        replayed.append(filters in self.graphs.get(batch, {}))
        replay(self, batch, filters, compute)

    GraphSteps.replay = counted  # type: ignore[method-assign]
    for name in ("llama", "gemma2", "qwen3_moe"):
        for quantization in ("none", "int8"):
            case = f"{name}, {quantization}"
            if args.only in f"graphs {case}":
                eager, graphs = (
                    sampled_tokens(name, args.seed, quantization, enforce_eager=eager) for eager in (True, False)
                )
                ok = eager == graphs and any(replayed)
                detail = f"{sum(map(len, graphs))} tokens, {sum(replayed)} of {len(replayed)} steps replayed"
                tell(check="graphs", name=case, ok=ok, detail=detail if eager == graphs else f"{eager} {graphs}"[:400])
                replayed.clear()
    for deterministic in (False, True):
        errors = captured_collectives(args.seed, deterministic=deterministic)
        name = f"NCCL, one rank{', deterministic' if deterministic else ''}"
        tell(check="graphs", name=name, ok=errors == 0, detail=f"{errors} elements differ")
    torch.cuda.synchronize()


def sampled_tokens(name: str, seed: int, quantization: str, *, enforce_eager: bool) -> list[list[int]]:
    """Tokens of 13 requests of a tiny model."""
    from shoal import LLM

    prompts, asked = asked_requests(seed, 13, 20)
    with tempfile.TemporaryDirectory() as folder, LLM(
        make_tiny(name, folder), dtype="float32", device="cuda", skip_tokenizer_init=True, block_size=4,
        max_num_seqs=16, deterministic=True, quantization=quantization, enforce_eager=enforce_eager,
        kv_cache_memory_bytes=64 << 20,
    ) as llm:  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def asked_requests(seed: int, count: int, longest: int, **more: Any) -> tuple[list[list[int]], list[Any]]:
    """Prompts and sampling of many kinds and lengths."""
    from shoal import SamplingParams
    from tests.model.tiny_models import VOCAB

    rng, kinds = random.Random(seed), [{}, {"top_p": 0.8}, {"top_k": 9, "min_p": 0.02}, {"presence_penalty": 0.5}]
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    asked = [
        SamplingParams(temperature=rng.choice((0.0, 0.8, 1.3)), seed=index, max_tokens=rng.randint(2, longest),
                       ignore_eos=True, **(kinds[index % 4] if index > 4 else {}), **more)
        for index in range(count)
    ]  # fmt: skip
    return prompts, asked


def check_bits(args: argparse.Namespace) -> None:
    """With `deterministic`, tokens and log-probabilities are the same bits alone and in a crowd, in any chunks, with
    and without cached prefixes, from blocks of another size, kernel by kernel, and on tensor ranks in a crowd.
    """
    prompts, asked = asked_requests(args.seed, 9, 20, logprobs=2)
    prompts = [prompts[0][:1] * 5 + prompt for prompt in prompts]  # blocks that can be shared
    sharded, chunked = {"tensor_parallel_size": 2, "ranks_per_device": 2}, {"max_num_batched_tokens": 7}
    ways: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [  # name, as asked, as compared, requests
        ("alone", {}, {}, 1),
        ("in chunks, three rows at most", {}, {**chunked, "max_num_seqs": 3}, 9),
        ("blocks of 7, nothing shared", {}, {"block_size": 7, "enable_prefix_caching": False}, 9),
        ("kernel by kernel", {}, {"enforce_eager": True}, 9),
        ("tensor 2, alone", sharded, sharded, 1),
        ("tensor 2, in chunks", sharded, {**sharded, **chunked}, 9),
    ]
    known: dict[tuple[str, ...], list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny(args.name, folder)
        for dtype, quantization in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int4")):
            for name, first, second, some in ways if quantization == "none" else ways[:2]:
                common = {"device": "cuda", "dtype": dtype, "quantization": quantization, "deterministic": True,
                          "block_size": 4}  # fmt: skip
                key = (dtype, quantization, *first)
                if key not in known:
                    known[key] = bits_of(path, prompts, asked, {**common, **first})
                found = bits_of(path, prompts[:some], asked[:some], {**common, **second})
                differ = [(a, b) for a, b in zip(found, known[key][:some], strict=True) if a != b]
                detail = f"{len(differ)} of {some} requests differ" + f": {differ[:1]}"[:300] * bool(differ)
                case = ", ".join([f"{args.name} {dtype}", *([quantization] if quantization != "none" else []), name])
                tell(check="deterministic", name=case, ok=not differ, detail=detail)


def make_tiny(name: str, folder: str) -> str:
    """A tiny model of the tests."""
    from tests.model.tiny_models import make_model

    return str(make_model(name, Path(folder)))


def bits_of(path: str, prompts: list[list[int]], asked: list[Any], settings: dict[str, Any]) -> list[Any]:
    """Every request's tokens and the log-probabilities of those and their rivals."""
    from shoal import LLM

    with LLM(path, skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20, **settings) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return [
        (one.token_ids, [{token: entry.logprob for token, entry in step.items()} for step in one.logprobs])
        for one in (output.outputs[0] for output in outputs)
    ]


def captured_collectives(seed: int, *, deterministic: bool) -> int:
    """Elements in which collectives of an NCCL group of one, replayed by a graph, differ from what they should give."""
    import torch
    import torch.distributed as dist

    from shoal.parallel.torch_comm import TorchCommunicator

    torch.manual_seed(seed)
    torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            group = TorchCommunicator(
                "tensor", dist.group.WORLD, (0,), 0, backend="nccl", timeout_s=30.0, deterministic=deterministic
            )
            x, total, whole = (torch.zeros(8, 64, device="cuda") for _ in range(3))

            def step() -> None:
                total.copy_(group.all_reduce(x + 1))
                whole.copy_(group.all_gather(x, [64]))

            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            x.copy_(torch.randn(8, 64, device="cuda"))
            graph.replay()
            return int((total != x + 1).sum() + (whole != x).sum())
        finally:
            dist.destroy_process_group()


class Stopwatch:
    """Times of the device alone. Before each run it is given FLUSHES times FLUSH_BYTES to write, so that the run's
    inputs have left the L2 cache, and that the host, which is slower than a small kernel, has handed over the whole run
    before the device begins with it.
    """

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda
        self.waste = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def median_s(self, run: Callable[[], Any]) -> float:
        """Seconds on the device, the median of TIMED_RUNS."""
        for _ in range(WARM_UP_RUNS):
            run()
        pairs = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED_RUNS)]
        for begin, end in pairs:
            self.cuda.synchronize()
            for _ in range(FLUSHES):
                self.waste.zero_()
            begin.record()
            run()
            end.record()
        self.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def time_kernels(args: argparse.Namespace) -> None:
    """The measured cases alone on the device: medians, and what they make of memory and arithmetic."""
    import torch

    watch, name = Stopwatch(), torch.cuda.get_device_name()

    def told(case: str, seconds: float, moved: int, flops: int) -> None:
        gbs, tflops = moved / seconds / 1e9, flops / seconds / 1e12
        detail = f"{1e6 * seconds:.1f} us, {gbs:.0f} GB/s, {tflops:.1f} TFLOP/s"
        tell(check="time", name=case, ok=True, detail=detail, microseconds=1e6 * seconds, gb_per_s=gbs,
             tflop_per_s=tflops, device=name)  # fmt: skip

    if args.only in "limits":
        source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
        told("limit: copy of 1 GiB", watch.median_s(lambda: target.copy_(source)), 2 * 2**30, 0)
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        told("limit: bfloat16 product of 8192", watch.median_s(lambda: a @ b), 3 * a.nbytes, 2 * 8192**3)
    for case in chosen_cases(args):
        if case.measured:
            seed_for(args, case)
            with torch.inference_mode():
                trial = case.make(torch.device("cuda"))
                told(f"{case.kernel} {case.name}", watch.median_s(trial.run), trial.bytes_moved, trial.flops)


def find_crossovers(args: argparse.Namespace) -> None:
    """Ours beside the library's kernel, over rows: what kernels/gpu/tables.py is to be set by."""
    import torch

    from shoal.kernels.gpu.crossovers import contests

    watch, name = Stopwatch(), torch.cuda.get_device_name()
    for contest in contests():
        if args.only in contest.name:
            torch.manual_seed(args.seed)
            with torch.inference_mode():
                ours, library = (1e6 * watch.median_s(run) for run in contest.make())
            detail = f"ours {ours:.1f} us, library {library:.1f} us, {library / ours:.2f}x"
            tell(check="crossover", name=contest.name, ok=True, detail=detail, microseconds=ours,
                 library_microseconds=library, device=name)  # fmt: skip


def report_kernels(args: argparse.Namespace) -> None:
    """What every case with a budget compiles to."""
    from shoal.kernels.gpu.checks import compile_case, over_budget

    for case in chosen_cases(args):
        if case.budget is None:
            continue
        for capability in CAPABILITIES:
            row = {"check": "compile", "name": f"{case.kernel} {case.name}", "kernel": case.kernel, "case": case.name}
            try:
                trial, found = case.make_sizes(), compile_case(case, capability)
            except Exception as error:  # noqa: BLE001 - reported as a failed check
                tell(**row, ok=False, detail=f"sm_{capability}: {error}"[-400:])
                continue
            for compiled in found:
                over = over_budget(case, compiled)
                detail = f"{compiled.registers} registers, {compiled.spill_bytes} B spilled, {compiled.shared_bytes} B"
                numbers = compiled._asdict()
                tell(**row, ok=over is None, detail=over or detail, bytes_moved=trial.bytes_moved, flops=trial.flops,
                     function=numbers.pop("name"), **numbers)  # fmt: skip


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("kernels", "model", "graphs", "deterministic", "times", "crossovers", "report"))
    parser.add_argument("name", nargs="?", help="of the tiny model")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose kernel and name contain this")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4", "fp8"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a GPU")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    args.scale = "tiny" if args.tiny or args.interpret else "full"
    args.device = "cpu" if args.interpret else "cuda"
    sys.path.insert(0, str(ROOT))
    jobs = {"kernels": check_kernels, "model": check_model, "graphs": check_graphs, "deterministic": check_bits}
    {**jobs, "times": time_kernels, "crossovers": find_crossovers, "report": report_kernels}[args.job](args)


if __name__ == "__main__":
    main()
