"""generate_on_ranks: whole generations on any tensor x pipeline layout, by warm test ranks; check_greedy: are they the
oracle's tokens?

Every rank of a job runs the same engine core over the same requests, so all make equal plans without a control channel;
the sampling rank broadcasts its results. What is tested is everything below the channel: scheduler, cache, worker,
sampler, decoder, collectives.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from shoal.configs.loader import load_config
from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import ShoalConfig
from shoal.engine.clock import VirtualClock
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import CacheGroup, Capacity, Executor
from shoal.engine.messages import OutputDelta, Request, StepPlan, StepResult
from shoal.engine.worker import Worker
from shoal.kernels.build import load_native
from shoal.model.families import load_spec
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec
from shoal.parallel.mesh import make_mesh
from tests.ranks import Ranks, run_ranks

NEAR_TIE = 1e-4  # a token whose logit is this close to the best one may be chosen by rounding
TALLY = {"tokens": 0, "near_ties": 0}  # of check_greedy in this process


class LockstepExecutor(Executor):
    """Runs each plan on this rank, then learns the result from the rank that sampled."""

    def __init__(self, worker: Worker, capacity: Capacity) -> None:
        self.worker, self.capacity = worker, capacity
        self.own: dict[int, StepResult | None] = {}

    def launch(self, plan: StepPlan) -> int:
        """Run the plan at once."""
        self.own[plan.step] = self.worker.run(plan)
        return plan.step

    def result(self, handle: int, timeout_s: float) -> StepResult:
        """Collective: the result as the sampling rank has it."""
        result, world = self.own.pop(handle), self.worker.mesh.world
        if world.size == 1:
            assert result is not None
            return result
        root = world.size - self.worker.shard.tp_size
        payload = msgspec.msgpack.encode(result) if result is not None else b""
        size = world.broadcast(torch.tensor([len(payload)]), root)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if result is not None:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        return msgspec.msgpack.decode(world.broadcast(data, root).numpy().tobytes(), type=StepResult)

    def health(self) -> None:
        """A dead rank shows in the next collective."""

    def stop(self) -> None:
        """Give back mesh and memory."""
        self.worker.close()


def make_worker(ranks: Ranks, config: ShoalConfig, spec: DecoderSpec, model_dir: str | None, backend: str) -> Worker:
    """This rank's worker with its weights loaded."""
    native = load_native(config.runtime.native)
    layout = config.parallel
    mesh = make_mesh(
        backend,
        ranks.rank,
        layout.tensor,
        layout.pipeline,
        ranks.rendezvous,
        ranks.timeout_s,
        deterministic=config.runtime.deterministic,
        native=native,
    )
    shard = shard_model(spec, layout, config.model.quantization)[ranks.rank]
    folder = None if model_dir is None else Path(model_dir)
    worker = Worker(config, spec, shard, mesh, folder, torch.device("cpu"))
    worker.load()
    return worker


def rank_generate(ranks: Ranks, job: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: run the job's requests to their ends; per request its tokens, logprobs, reason and cached prompt
    tokens."""
    settings = {"model.dtype": "float32", "runtime.seed": 0, **job["settings"]}
    config = load_config(overrides=settings).config
    spec, _ = load_spec(job["model_dir"])
    worker = make_worker(ranks, config, spec, job["model_dir"], job["backend"])
    windows = spec.cache_windows
    worker.allocate_cache([job["num_blocks"]] * len(windows))
    groups = [
        CacheGroup(name="full" if window is None else f"window{window}", window=window, num_blocks=job["num_blocks"])
        for window in windows
    ]
    capacity = Capacity(
        block_size=config.cache.block_size,
        groups=groups,
        max_model_len=min(spec.max_position, 512),
        vocab_size=spec.vocab_size,
        max_in_flight=config.parallel.pipeline,
    )
    clock = VirtualClock()  # measured times would differ between ranks, and with them the plans
    core = EngineCore(config, LockstepExecutor(worker, capacity), clock=clock)
    if job["overcommit"]:  # admit what will not fit, so that preemption must make room
        core.scheduler.admission.fits = lambda *_: True  # type: ignore[method-assign]
    found = run_core(core, [msgspec.convert(request, Request) for request in job["requests"]])
    core.executor.stop()
    return {"entries": found, "preemptions": core.stats().preemptions}


def run_core(core: EngineCore, requests: list[Request]) -> list[dict[str, Any]]:
    """Step until every request has ended, checking the cache's integrity after each step."""
    found = {
        request.request_id: {"tokens": [], "logprobs": [], "prompt_logprobs": None, "reason": None, "cached": 0}
        for request in requests
    }
    for request in requests:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            collect(found[delta.request_id], delta)
        core.check_integrity()
    return list(found.values())


def collect(entry: dict[str, Any], delta: OutputDelta) -> None:
    """Add a delta to what is known of its request."""
    entry["tokens"] += delta.token_ids
    entry["logprobs"] += [msgspec.to_builtins(item) for item in delta.logprobs or []]
    if delta.prompt_logprobs is not None:
        entry["prompt_logprobs"] = msgspec.to_builtins(delta.prompt_logprobs)
    if delta.finish_reason is not None:
        entry["reason"] = delta.finish_reason
        assert delta.finish_reason != "error", delta.error
    entry["cached"] = max(entry["cached"], delta.num_cached_tokens)


def make_requests(prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
    """One request per prompt, all alike, as run_ranks carries them."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
    return [
        {"type": "Request", "request_id": f"r{i}", "prompt_token_ids": ids, "sampling": msgspec.to_builtins(params)}
        for i, ids in enumerate(prompts)
    ]


def generate_on_ranks(
    model_dir: Path,
    tp_size: int,
    pp_size: int,
    requests: list[dict[str, Any]],
    *,
    num_blocks: int = 256,
    backend: str = "shm",
    timeout_s: float = 120.0,
    least_preemptions: int = 0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run the requests on a layout; every rank must have seen the same. settings: section__key=value of the
    configuration."""
    given = {"parallel.tensor": tp_size, "parallel.pipeline": pp_size, "cache.block_size": 4}
    given["scheduler.max_num_batched_tokens"] = 24
    given |= {name.replace("__", "."): value for name, value in settings.items()}
    job = {
        "model_dir": str(model_dir),
        "settings": given,
        "requests": requests,
        "num_blocks": num_blocks,
        "backend": backend,
        "overcommit": least_preemptions > 0,
    }
    found = run_ranks(tp_size * pp_size, rank_generate, job, timeout_s=timeout_s)
    assert all(other == found[0] for other in found), "ranks disagree about the results"
    assert found[0]["preemptions"] >= least_preemptions, f"only {found[0]['preemptions']} preemptions happened"
    return found[0]["entries"]


def check_close(one: list[dict[str, Any]], many: list[dict[str, Any]], limit: float) -> None:
    """Equal tokens; where a request first differs, both tokens were nearly as good, by one rank's own logprobs."""
    for ours, theirs in zip(one, many, strict=True):
        pairs = zip(ours["tokens"], theirs["tokens"], ours["logprobs"], strict=True)
        for mine, other, entry in pairs:
            if mine != other:
                scores = dict(zip(entry[0], entry[1], strict=True))
                assert other in scores and scores[mine] - scores[other] < limit, (mine, other, entry)
                break


def stepwise_logits(oracle: transformers.PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The oracle's logits after the prompt and after each token but the last, fed one by one to its own cache."""
    out = oracle(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in tokens[:-1]:
        out = oracle(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@torch.inference_mode()
def check_greedy(
    oracle: transformers.PreTrainedModel, prompt: list[int], tokens: list[int], *, stepwise: bool = False
) -> list[float]:
    """Assert that every token is the oracle's best one after what stands before it; returns the gaps of near ties."""
    if stepwise:
        logits = stepwise_logits(oracle, prompt, tokens)
    else:
        logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
    gaps = logits.max(-1).values - logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    ties = [float(gap) for gap in gaps if gap > 0]
    TALLY["tokens"] += len(tokens)
    TALLY["near_ties"] += len(ties)
    if ties:
        print("gaps to the best token:", ties)
    assert max(ties, default=0.0) < NEAR_TIE, f"tokens {tokens} are not the oracle's after {len(prompt)} prompt tokens"
    return ties
