"""What the launcher hands a new process: all an engine or a rank needs to know, in one message. No torch.

The settings in it are resolved: no "auto" is left in dtype, device, collectives, threads or max_model_len.
"""

import hashlib
import platform
from importlib import metadata

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.configs.version import VERSION
from shoal.engine.messages import Message
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec

WORKER = "shoal.engine.worker:Worker"


class Model(Message, frozen=True, kw_only=True):
    """What is run: settings, decoder, the checkpoint's folder here (None: dummy weights), the worker's class."""

    config: ShoalConfig
    spec: DecoderSpec
    model_dir: str | None
    worker: str = WORKER


class RankBootstrap(Message, frozen=True, kw_only=True):
    """One rank. rank: within its replica. device: "cpu" or "cuda:N". address, key: of its engine's control channel.
    cores: those it keeps to; none: any.

    config_fingerprint: made by `fingerprint` where the settings were read, and compared by the engine.
    """

    rank: int
    model: Model
    shard: ModelShard
    device: str
    threads: int
    address: str
    key: bytes
    config_fingerprint: str
    cores: tuple[int, ...] = ()


class EngineBootstrap(Message, frozen=True, kw_only=True):
    """One replica's engine.

    shards: of every rank. devices: of the ranks it starts itself, by rank; the others connect from elsewhere. cores: of
    those among them that keep to some.
    ranks_per_device: ranks, of all replicas, that share one device's memory.
    grace_s: seconds it keeps its ranks without a front end, for another to take over; 0 ends with the first one.
    hosts: what the launcher calls the host of each rank; where it says nothing, ranks name their hosts themselves.
    front_address: where its front end listens. listen_host: None for Unix sockets, else the interface ranks connect to.
    """

    replica: int
    model: Model
    shards: list[ModelShard]
    devices: dict[int, str]
    ranks_per_device: int
    threads: int
    front_address: str
    key: bytes
    config_fingerprint: str
    listen_host: str | None = None
    grace_s: float = 0.0
    hosts: dict[int, str] = msgspec.field(default_factory=dict)
    cores: dict[int, tuple[int, ...]] = msgspec.field(default_factory=dict)


RANK_BOOTSTRAP: "msgspec.msgpack.Decoder[RankBootstrap]" = msgspec.msgpack.Decoder(RankBootstrap)
ENGINE_BOOTSTRAP: "msgspec.msgpack.Decoder[EngineBootstrap]" = msgspec.msgpack.Decoder(EngineBootstrap)


def fingerprint(config: ShoalConfig, spec: DecoderSpec) -> str:
    """What all ranks must agree on: settings, as they were given, and decoder.

    Folders may differ between hosts, and defaults of sampling are the front end's alone.
    """
    model = msgspec.structs.replace(config.model, path=None, tokenizer=None)
    anywhere = msgspec.structs.replace(config, model=model, sampling={})
    return hashlib.sha256(msgspec.msgpack.encode((anywhere, spec))).hexdigest()[:16]


def versions() -> str:
    """Of shoal, Python and torch, as installed."""
    return f"shoal {VERSION}, Python {platform.python_version()}, torch {metadata.version('torch')}"
