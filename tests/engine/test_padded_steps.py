"""Steps as a GPU's CUDA graphs compute them: padded, in tensors that stay, sampling included. Here through
Triton's interpreter, without the capture, which only a GPU has (scripts/gpu_check.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import LLM, SamplingParams
from shoal.engine import worker
from shoal.engine.begun import Begun
from shoal.engine.worker import Worker
from shoal.kernels import device
from shoal.model.graph_steps import GraphSteps
from shoal.model.memory_estimate import GraphSizes
from tests.model.tiny_models import make_model

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
PROMPTS = [[5, 9, 13], [40, 7], [3, 3, 8], [17]]
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.2, seed=4, top_p=0.8, top_k=12, max_tokens=3, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=5, min_p=0.05, max_tokens=3, ignore_eos=True),
]
SIZES = GraphSizes(rows=(1, 2, 8), mixed_rows=(8,), tokens=(16,))
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)
TOLD = SamplingParams(temperature=0.8, seed=6, logprobs=2, presence_penalty=0.5, max_tokens=4, ignore_eos=True)


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go through the Triton kernels."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)


def generate(folder: Path, asked: list[SamplingParams], **settings: Any) -> list[Any]:
    """Every prompt's tokens, and their log-probabilities where asked for; in two rounds, since mixed steps are padded
    from the second of a size on.
    """
    with LLM(
        str(folder), dtype="float32", device="cpu", native="off", skip_tokenizer_init=True, block_size=4,
        max_num_batched_tokens=12, max_num_seqs=8, **settings,
    ) as llm:  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS[: len(asked)]]
        outputs = [
            *llm.generate(prompts[:1], ONE_TOKEN, use_tqdm=False),
            *llm.generate(prompts, asked, use_tqdm=False),
        ]
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "asked",
    [pytest.param(ASKED, id="plain"), pytest.param([*ASKED[:2], TOLD], id="told", marks=pytest.mark.slow)],
)
def test_padded_steps_choose_what_others_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: list[SamplingParams]
) -> None:
    folder, sizes = make_model(name, tmp_path), []
    expected = generate(folder, asked)
    begin, compute, try_begin = GraphSteps.begin, GraphSteps.compute, Worker.try_begin

    def counted(self: GraphSteps, batch: Any, *rest: Any) -> Any:
        sizes.append((batch.num_rows, batch.num_tokens))
        return begin(self, batch, *rest)

    def twice(self: GraphSteps, *arguments: Any) -> None:
        """What is captured has been computed once: a step may change nothing that it reads."""
        compute(self, *arguments)
        if self.num_begun < 3:
            first = self.chosen_R2.clone()
            compute(self, *arguments)
            assert torch.equal(self.chosen_R2, first)

    def noted(self: Worker, begun: Begun) -> None:
        try_begin(self, begun)
        ahead.append(begun.step is not None and begun.previous is not None)

    ahead: list[bool] = []
    monkeypatch.setattr(GraphSteps, "begin", counted)
    monkeypatch.setattr(GraphSteps, "compute", twice)
    monkeypatch.setattr(Worker, "try_begin", noted)
    monkeypatch.setattr(worker, "graph_sizes", lambda config: SIZES)
    found = generate(folder, asked)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        for mine, yours in zip(ours or [], theirs or [], strict=True):
            assert {token: one.rank for token, one in mine.items()} == {token: one.rank for token, one in yours.items()}
    assert set(sizes) >= {(8, 8), (8, 16)} and any(ahead) and not all(ahead)
