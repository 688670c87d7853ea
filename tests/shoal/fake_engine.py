"""A started engine without ranks: the real engine loop over a FakeExecutor, whose tokens are hashes of the context."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from shoal.configs.resolved import ResolvedConfig
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import FakeExecutor, Fault, StepLatency
from shoal.engine.inprocess_client import InprocessClient

DEMO = str(Path(__file__).resolve().parents[2] / "shoal" / "demo")
VOCAB_SIZE = 4096
MAX_MODEL_LEN = 256


def module(*, step_s: float = 0.0, fault: Fault | None = None) -> ModuleType:
    """What stands in for shoal.launcher.bring_up. `clients` on it lists the engines it started."""
    clients: list[InprocessClient] = []

    async def start_engine(resolved: ResolvedConfig, model_dir: Path | None, on_progress: Any = None) -> Any:
        capacity = Capacity(
            block_size=16,
            groups=[CacheGroup(name="full", window=None, num_blocks=1000)],
            max_model_len=resolved.config.model.max_model_len or MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
        )
        executor = FakeExecutor(capacity, latency=StepLatency(base_s=step_s) if step_s else None, fault=fault)
        clients.append(InprocessClient(EngineCore(resolved.config, executor)))
        return SimpleNamespace(
            client=clients[-1], vocab_size=VOCAB_SIZE, max_model_len=capacity.max_model_len, report="memory: all of it"
        )

    stand_in = ModuleType("shoal.launcher.bring_up")
    stand_in.__dict__.update(start_engine=start_engine, clients=clients)
    return stand_in


def install(**options: Any) -> ModuleType:
    """Put the stand-in where `open_session` finds it, for a process of its own."""
    stand_in = module(**options)
    sys.modules["shoal.launcher.bring_up"] = stand_in
    return stand_in
