"""What a launcher and the crews of its hosts tell each other. Plain bytes to whoever carries them (Ray). No torch."""

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.engine.messages import Message
from shoal.launcher.bootstrap import EngineBootstrap, RankBootstrap
from shoal.model.spec import DecoderSpec


class HostQuery(Message, frozen=True, kw_only=True):
    """Is this host fit to run the model? config: as the front end was given it; spec: as it read the checkpoint.

    model_path: `demo`, a hub id, or an absolute folder; None for no checkpoint at all. spec: used then. worker: to be
    imported early.
    """

    config: ShoalConfig
    spec: DecoderSpec
    model_path: str | None
    worker: str


class HostReport(Message, frozen=True, kw_only=True):
    """What a host is, has and read.

    host: equal where Unix sockets and memory can be shared. name: for people. cores: a process may use there;
    memory_nodes: parts of its memory that have some of these. gpus: torch sees in the crew. native: the C kernels are
    there. versions, config, checkpoint: must be equal everywhere.
    model_dir: the checkpoint's folder there.
    """

    host: str
    name: str
    cores: int
    memory_nodes: int
    gpus: int
    native: bool
    versions: str
    config: str
    checkpoint: str
    model_dir: str | None


class HostRefused(Message, frozen=True, kw_only=True):
    """The host cannot run it. users: the settings or the checkpoint are at fault, not a malfunction."""

    text: str
    users: bool


class StartRanks(Message, frozen=True, kw_only=True):
    """Fork these ranks; their engine listens already."""

    ranks: list[RankBootstrap]


class Assignment(Message, frozen=True, kw_only=True):
    """What a crew is for, kept by it so that a restarted controller can ask. number: its replica; index: of the crew
    within the replica; node_id, address: of its node.
    """

    number: int
    index: int
    ranks: list[int]
    node_id: str
    address: str
    report: HostReport


class Muster(Message, frozen=True, kw_only=True):
    """A crew's answer to a restarted controller: its assignment, None before there was one, and the engine it runs."""

    assignment: Assignment | None
    engine: EngineBootstrap | None


class Ended(Message, frozen=True, kw_only=True):
    """A process of the crew has ended, told in words."""

    name: str
    how: str
    by_signal: bool


class Ends(Message, frozen=True, kw_only=True):
    """What has ended since the crew was last told to start something."""

    ends: list[Ended]


HOST_QUERY: "msgspec.msgpack.Decoder[HostQuery]" = msgspec.msgpack.Decoder(HostQuery)
HOST_ANSWER: "msgspec.msgpack.Decoder[HostReport | HostRefused]" = msgspec.msgpack.Decoder(HostReport | HostRefused)
ASSIGNMENT: "msgspec.msgpack.Decoder[Assignment]" = msgspec.msgpack.Decoder(Assignment)
MUSTER: "msgspec.msgpack.Decoder[Muster]" = msgspec.msgpack.Decoder(Muster)
START_ENGINE: "msgspec.msgpack.Decoder[EngineBootstrap]" = msgspec.msgpack.Decoder(EngineBootstrap)
START_RANKS: "msgspec.msgpack.Decoder[StartRanks]" = msgspec.msgpack.Decoder(StartRanks)
ENDS: "msgspec.msgpack.Decoder[Ends]" = msgspec.msgpack.Decoder(Ends)
