"""A worker without a model: every rank checks every plan with FakeRanks, and the last stage's tensor rank 0 answers
with FakeModel's tokens.

Faults are planned by what a request or the model's path says. A prompt that begins with FAIL, HANG, LEAVE or CRASH
does that on the rank named by its second token; after one that begins with SLOW every step takes that rank
SLOW_STEP_S, so that a stream does not end before something was done to it. `model.path` = "refuse 1", "leave 1" or
"hang 1" does it while that rank loads.
"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

from shoal.configs.schema import ModelConfig, ParallelConfig, ShoalConfig
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_ranks import FakeRanks
from shoal.engine.messages import StepPlan, StepResult
from shoal.model.ledger import MemoryReport
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention, DecoderSpec, GatedFfn, Layer, Norm

WORKER = "tests.launcher.fake_worker:FakeWorker"
FAIL, HANG, LEAVE, CRASH, SLOW = 90, 91, 92, 93, 94
SLOW_STEP_S = 0.02
VOCAB_SIZE = 100

_NORM = Norm(kind="rms", eps=1e-6)
SPEC = DecoderSpec(
    family="fake",
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    layers=[
        Layer(
            mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=4, scale=0.5),
            ffn=GatedFfn(intermediate_size=32, activation="silu"),
            pre_mixer_norm=_NORM,
            pre_ffn_norm=_NORM,
        )
    ]
    * 4,
    final_norm=_NORM,
    max_position=512,
    dtype="float32",
    tie_embeddings=False,
)


class FakeWorker:
    """See the module."""

    def __init__(
        self,
        config: ShoalConfig,
        spec: DecoderSpec,
        shard: ModelShard,
        mesh: Any,
        model_dir: Path | None,
        device: Any,
    ) -> None:
        self.config, self.spec, self.shard = config, spec, shard
        self.rank = shard.pp_rank * shard.tp_size + shard.tp_rank
        self.step_s = 0.0

    def load(self, on_progress: Any = None) -> None:
        """In four parts."""
        fault, _, rank = (self.config.model.path or "").partition(" ")
        if rank == str(self.rank):
            if fault == "refuse":
                raise ValueError(f"model-{self.rank}.safetensors: tensor x.weight is missing")
            if fault == "leave":
                sys.exit(5)
            if fault == "hang":
                time.sleep(60)
        for part in range(1, 5):
            on_progress(part * 100, 400)

    def on_layer(self, tick: Any) -> None:
        """There are no layers."""

    def profile(self) -> MemoryReport:
        """One rank has less than the others."""
        return MemoryReport(
            rank=self.rank,
            weights_bytes=400,
            activation_bytes=100,
            available_bytes=(1 << 30) - self.rank,
            block_bytes=[1 << 20],
        )

    def allocate_cache(self, num_blocks: list[int]) -> None:
        """Imaginary."""
        assert self.config.model.max_model_len is not None
        capacity = Capacity(
            block_size=self.config.cache.block_size,
            groups=[CacheGroup(name="full", window=None, num_blocks=count) for count in num_blocks],
            max_model_len=self.config.model.max_model_len,
            vocab_size=self.spec.vocab_size,
            max_in_flight=self.config.parallel.pipeline,
        )
        self.ranks = FakeRanks(capacity)

    def run(self, plan: StepPlan) -> StepResult | None:
        """Check the plan, do what a prompt orders, answer."""
        for new in plan.new_sequences:
            if len(new.token_ids) > 1 and new.token_ids[1] == self.rank:
                self.obey(new.token_ids[0])
        time.sleep(self.step_s)
        rows = self.ranks.run(plan, {})
        if self.shard.pp_rank == self.shard.pp_size - 1 and self.shard.tp_rank == 0:
            return StepResult(epoch=plan.epoch, step=plan.step, rows=rows)
        return None

    def obey(self, order: int) -> None:
        """A planned fault."""
        if order == FAIL:
            raise RuntimeError("a planned fault")
        if order == HANG:
            time.sleep(60)
        if order == LEAVE:
            print("leaving without a word", flush=True)
            sys.exit(3)
        if order == CRASH:
            ctypes.string_at(0)
        if order == SLOW:
            self.step_s = SLOW_STEP_S

    def close(self) -> None:
        """Nothing to give back."""


def config(tensor: int = 1, pipeline: int = 1, data: int = 1, path: str | None = None, **limits: float) -> ShoalConfig:
    """Resolved settings for fake workers. limits: of the launcher, in seconds."""
    from shoal.configs.schema import LauncherConfig, RuntimeConfig

    return ShoalConfig(
        model=ModelConfig(path=path, dtype="float32", max_model_len=512, load_format="dummy"),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, data=data),
        launcher=LauncherConfig(**{"start_timeout_s": 60.0, "step_timeout_s": 20.0, **limits}),
        runtime=RuntimeConfig(device="cpu", collectives="auto", native="auto", threads=1),
    )
