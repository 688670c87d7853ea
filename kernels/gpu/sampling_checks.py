"""Checks of sampling and log-probabilities. Tokens are exact: near ties are drawn so rarely that a difference is an
error.
"""

from collections.abc import Iterator

import torch

from shoal.kernels.gpu.checks import Budget, Case, Outputs, Scale, Trial
from shoal.kernels.gpu.logprobs import launch_row_sums
from shoal.kernels.gpu.sample_rows import RowSampling, sample_device_rows, to_device
from shoal.kernels.logit_filters import filter_logits_
from shoal.kernels.philox import gumbel_noise

BUDGET = Budget(registers=168)


def sampling_case(rows: int, vocab: int, *, filtered: bool, big: bool = False) -> Case:
    """Temperatures with and without filters, and a bias. Compared: the tokens."""

    def make(device: torch.device) -> Trial:
        logits = torch.randn(rows, vocab, device=device) * 3
        settings = [
            RowSampling(
                0.5 + row % 3 / 2, row % 4 * 20 * filtered, 0.9 if filtered else 1.0, 0.01 * (row % 2 * filtered),
                row, 7 * row, row % 2, [(row, 2.0)],
            )
            for row in range(rows)
        ]  # fmt: skip

        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(one, name) for one in settings], device=device)

        def reference() -> Outputs:
            x = logits.clone()
            for row in range(rows):
                x[row, row] += 2.0
            x /= column("temperature").unsqueeze(1)
            filter_logits_(x, column("top_k"), column("top_p"), column("min_p"))
            noise = gumbel_noise(column("seed"), column("position"), column("sample_index"), 0, vocab)
            return ((x + noise).argmax(-1),)

        prepared = to_device(settings, device)

        def run() -> Outputs:
            return (sample_device_rows(logits, prepared)[1],)

        return Trial(
            run=run, reference=reference, plain=None, bytes_moved=8 * logits.numel(), flops=150 * logits.numel()
        )

    name = f"{rows} x {vocab}{', filtered' if filtered else ''}"
    return Case(
        kernel="sampling", name=name, dtype=torch.float32, make=make, budget=BUDGET if big else None, measured=big
    )


def row_sums_case(rows: int, vocab: int, *, big: bool = False) -> Case:
    """Log-sum-exp and ranks."""

    def make(device: torch.device) -> Trial:
        logits = torch.randn(rows, vocab, device=device) * 3
        chosen = logits[:, vocab // 2].contiguous()

        def run() -> Outputs:
            largest, total, above = launch_row_sums(logits, chosen)
            return largest + total.log(), above

        def torch_way(kind: torch.dtype) -> Outputs:
            return logits.to(kind).logsumexp(-1), (logits > chosen.unsqueeze(1)).sum(-1)

        return Trial(
            run=run,
            reference=lambda: torch_way(torch.float64),
            plain=lambda: torch_way(torch.float32),
            bytes_moved=4 * logits.numel(),
            flops=10 * logits.numel(),
        )

    name = f"log-sum-exp {rows} x {vocab}"
    return Case(
        kernel="logprobs", name=name, dtype=torch.float32, make=make, budget=BUDGET if big else None, measured=big
    )


def cases(scale: Scale) -> Iterator[Case]:
    """tiny: a few hundred tokens; full: real vocabularies."""
    yield sampling_case(3, 301, filtered=False)
    yield sampling_case(5, 301, filtered=True)
    yield row_sums_case(3, 301)
    if scale == "full":
        for rows, vocab in [(1, 128256), (64, 32000), (64, 128256)]:
            yield sampling_case(rows, vocab, filtered=False, big=True)
            yield sampling_case(rows, vocab, filtered=True, big=True)
            yield row_sums_case(rows, vocab, big=True)
