"""Nats per token of a model as Shoal runs it, per type of weights: what quantisation costs. Through prompt_logprobs.

    python scripts/eval_perplexity.py                       # the demo model on its held-out text
    python scripts/eval_perplexity.py --model DIR --text FILE --weights bfloat16 int8:bfloat16 --tokens 100000

--weights: DTYPE, or QUANTIZATION:DTYPE; with +fp8 behind it keys and values are kept in FP8. The text is cut into rows
of --row tokens, each behind the first token of the model's own prompts; every row is scored by itself. Beside the mean
stands the difference from the first of --weights on the same tokens, with its standard error over rows. The demo's
held-out text is made from this machine's standard library (scripts/demo_text.py), so compare numbers of one machine.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shoal import LLM, SamplingParams

DEMO_SEED = 2  # of the chats' questions: what the shipped model was trained with


def held_out_texts() -> list[str]:
    """The demo's held-out documents of every kind."""
    from demo_text import build_corpus

    return [text for texts in build_corpus(DEMO_SEED).held_out.values() for text in texts]


def make_rows(llm: LLM, texts: list[str], length: int, most: int | None) -> list[list[int]]:
    """Token rows, each of at most `length` tokens behind a first token that is given, of about `most` tokens in all."""
    tokenizer = llm.get_tokenizer()
    encoded = [list(tokenizer.encode(text)) for text in texts]
    first, flat = encoded[0][0], [token for ids in encoded for token in ids]
    rows = [[first, *flat[start : start + length]] for start in range(0, len(flat), length)]
    if most is not None and most < len(flat):
        step = len(flat) / most
        rows = [rows[int(index * step)] for index in range(max(1, int(len(rows) / step)))]
    return rows


def score(llm: LLM, rows: list[list[int]]) -> list[float]:
    """The sum of nats of every row."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params)
    nats = []
    for row, output in zip(rows, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = zip(row[1:], output.prompt_logprobs[1:], strict=True)
        nats.append(-sum(entry[token].logprob for token, entry in entries if entry is not None))
    return nats


def main() -> None:
    """Measure every kind of weights and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="a text file; default: the demo's held-out documents")
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16", "int8:float32", "int4:float32"])
    parser.add_argument("--row", type=int, default=1000, help="tokens per row")
    parser.add_argument("--tokens", type=int, help="score about this many tokens, rows evenly spread; default: all")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    texts = held_out_texts() if args.text is None else [args.text.read_text(encoding="utf-8")]
    baseline: list[float] = []
    found = {}
    for name in args.weights:
        weights, _, cache = name.partition("+")
        quantization, _, dtype = weights.rpartition(":")
        settings = {"dtype": dtype, "quantization": quantization or "none", "kv_cache_dtype": cache or "auto"}
        with LLM(args.model, enable_prefix_caching=False, **settings) as llm:
            rows = make_rows(llm, texts, args.row, args.tokens)
            started = time.perf_counter()
            nats = score(llm, rows)
        baseline = baseline or nats
        count = sum(len(row) - 1 for row in rows)
        deltas = [a - b for a, b in zip(nats, baseline, strict=True)]
        spread = statistics.stdev(deltas) * math.sqrt(len(rows)) / count if len(rows) > 1 else 0.0
        mean, delta = sum(nats) / count, sum(deltas) / count
        found[name] = {"nats": mean, "delta": delta, "standard_error": spread, "tokens": count}
        print(
            f"{name:14} {mean:.4f} nats per token (perplexity {math.exp(mean):.3f}), {delta:+.4f} +- {spread:.4f} "
            f"against {args.weights[0]}; {count} tokens in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
