"""Shoal: distributed inference for large language models.

    from shoal import LLM, SamplingParams

Names are loaded when they are first used; importing the package alone loads nothing heavy.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from shoal.configs.version import VERSION as __version__

# OpenMP's threads wait actively for 7 ms where they meet, and keep the one they wait for from a core when others use
# the cores as well: a step then takes ten times as long. 10,000 turns are 0.2 ms. Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_PLACES = {
    "LLM": "shoal.llm",
    "AsyncLLM": "shoal.async_llm",
    "SamplingParams": "shoal.configs.sampling",
    "ConfigError": "shoal.configs.problems",
    "EngineError": "shoal.engine.client",
    "QueueFull": "shoal.engine.client",
    "RequestOutput": "shoal.server.outputs",
    "CompletionOutput": "shoal.server.outputs",
    "Logprob": "shoal.server.outputs",
    "RequestMetrics": "shoal.server.outputs",
}

if TYPE_CHECKING:
    from shoal.async_llm import AsyncLLM as AsyncLLM
    from shoal.configs.problems import ConfigError as ConfigError
    from shoal.configs.sampling import SamplingParams as SamplingParams
    from shoal.engine.client import EngineError as EngineError
    from shoal.engine.client import QueueFull as QueueFull
    from shoal.llm import LLM as LLM
    from shoal.server.outputs import CompletionOutput as CompletionOutput
    from shoal.server.outputs import Logprob as Logprob
    from shoal.server.outputs import RequestMetrics as RequestMetrics
    from shoal.server.outputs import RequestOutput as RequestOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "Logprob",
    "QueueFull",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """A public name, imported on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
