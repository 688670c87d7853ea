"""StartedEngine: what every way of starting an engine returns."""

import msgspec

from shoal.engine.client import EngineClient


class StartedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """A running engine. vocab_size, max_model_len: the model's bounds. report: choices made, and the memory table."""

    client: EngineClient
    vocab_size: int
    max_model_len: int
    report: str
