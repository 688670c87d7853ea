"""One engine under test, in a process of its own: `python scripts/peer_engines.py ENGINE MODEL DTYPE DEVICE`. Started
by bench_peers.py.

Reads one workload per line from stdin, {"requests": [{"ids": [...], "max_tokens": n}, ...]}, runs it greedily with end
tokens ignored, and answers on the file descriptor given as --reply-fd with {"elapsed_s": ..., "cpu_s": ...,
"output_tokens": ...}, cpu_s being the processor time of all threads of this process.
The first line it writes is {"ready_s": ...}: seconds from start to ready.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

PR_SET_PDEATHSIG = 1
GPU_CACHE_BYTES = 8 << 30  # engines share the card
Requests = list[dict[str, Any]]
Run = Callable[[Requests], int]  # runs a workload, returns the number of output tokens it asked for


def shoal_engine(
    model: str, dtype: str, device: str, *, enforce_eager: bool = False, quantization: str = "none"
) -> Run:
    """Shoal through its public API."""
    from shoal import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        device=device,
        enforce_eager=enforce_eager,
        quantization=quantization,
        kv_cache_memory_bytes=GPU_CACHE_BYTES if device == "cuda" else None,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        threads=int(os.environ["OMP_NUM_THREADS"]),
    )

    def run(requests: Requests) -> int:
        salt = str(time.perf_counter_ns())  # prefixes are shared within a workload, not between rounds
        prompts = [{"prompt_token_ids": r["ids"], "cache_salt": salt} for r in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False)
            for r in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def load_transformers(model: str, dtype: str, device: str, attention: str) -> Any:
    """A Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=attention)
    return net.to(device).eval()


def transformers_static(model: str, dtype: str, device: str) -> Run:
    """`generate` on one left-padded batch; a batch runs as long as its longest output, only asked-for tokens count."""
    import torch

    net = load_transformers(model, dtype, device, "sdpa")

    def run(requests: Requests) -> int:
        longest = max(len(r["ids"]) for r in requests)
        ids = torch.tensor([[0] * (longest - len(r["ids"])) + r["ids"] for r in requests])
        mask = torch.tensor([[0] * (longest - len(r["ids"])) + [1] * len(r["ids"]) for r in requests])
        ids, mask = ids.to(device), mask.to(device)
        steps = max(r["max_tokens"] for r in requests)
        with torch.inference_mode():
            net.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=steps,
                min_new_tokens=steps,
                pad_token_id=0,
                eos_token_id=None,
            )
        return sum(r["max_tokens"] for r in requests)

    return run


def transformers_continuous(model: str, dtype: str, device: str) -> Run:
    """`generate_batch`'s manager with explicit sizes (its defaults take 10 GB)."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    net = load_transformers(model, dtype, device, "paged|sdpa")
    sizes = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512)
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(requests: Requests) -> int:
        with (
            torch.no_grad(),
            net.continuous_batching_context_manager(
                generation_config=settings, continuous_batching_config=sizes, timeout=60.0, warmup=False
            ) as manager,
        ):
            for r in requests:
                manager.add_request(r["ids"], max_new_tokens=r["max_tokens"])
            done, deadline = 0, time.monotonic() + 1800
            while done < len(requests):
                if time.monotonic() > deadline:
                    raise TimeoutError("continuous batching did not finish within 1800 s")
                result = manager.get_result(timeout=5.0)
                if result is not None and result.is_finished():
                    done += 1
        return sum(r["max_tokens"] for r in requests)

    return run


def vllm_engine(model: str, dtype: str, device: str) -> Run:
    """vLLM, when this interpreter has it; its build knows the device."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, max_model_len=2048, enable_prefix_caching=True)

    def run(requests: Requests) -> int:
        params = [
            SamplingParams(temperature=0.0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False)
            for r in requests
        ]
        llm.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": r["ids"]} for r in requests], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


ENGINES: dict[str, Callable[[str, str, str], Run]] = {
    "shoal": shoal_engine,
    "shoal-eager": partial(shoal_engine, enforce_eager=True),
    "shoal-int8": partial(shoal_engine, quantization="int8"),
    "shoal-int4": partial(shoal_engine, quantization="int4"),
    "shoal-fp8": partial(shoal_engine, quantization="fp8"),
    "transformers": transformers_static,
    "transformers-cb": transformers_continuous,
    "vllm": vllm_engine,
}


def main() -> None:
    """Load the engine, then answer workloads until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("model")
    parser.add_argument("dtype")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process does not see that stdin ended
    with os.fdopen(args.reply_fd, "w") as reply:
        start = time.perf_counter()
        run = ENGINES[args.engine](args.model, args.dtype, args.device)
        print(json.dumps({"ready_s": time.perf_counter() - start}), file=reply, flush=True)
        for line in sys.stdin:
            requests = json.loads(line)["requests"]
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens = run(requests)
            answer = {
                "elapsed_s": time.perf_counter() - start,
                "cpu_s": time.process_time() - cpu_start,
                "output_tokens": tokens,
            }
            print(json.dumps(answer), file=reply, flush=True)


if __name__ == "__main__":
    main()
