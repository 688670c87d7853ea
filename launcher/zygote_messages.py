"""What a zygote and those who fork through it say to each other."""

import msgspec

from shoal.engine.messages import Message


class Fork(Message, frozen=True, kw_only=True):
    """Owner -> zygote: fork a child that calls entry ("module:function") with payload and, when it supervises, a
    connection of its own.

    process_id: chosen by the sender, unique on its connection. name: what the child is called in `ps` and in messages.
    """

    process_id: int
    name: str
    entry: str
    payload: bytes
    supervises: bool = False


class Signal(Message, frozen=True, kw_only=True):
    """Owner -> zygote: send a signal to a child, if it still runs (the zygote reaps, so that its id cannot be
    another's).
    """

    process_id: int
    signal: int


class Loaded(Message, frozen=True, kw_only=True):
    """Zygote -> owner, once: ready to fork, or why not. cuda: torch was built for GPUs."""

    pid: int
    cuda: bool = False
    error: str | None = None


class Forked(Message, frozen=True, kw_only=True):
    """Zygote -> owner: the child's pid."""

    process_id: int
    pid: int


class Exited(Message, frozen=True, kw_only=True):
    """Zygote -> owner: a child ended (or could not be forked: pid 0). status: exit code, or minus the signal that
    killed it.

    log: the last of what it wrote to stdout and stderr.
    """

    process_id: int
    pid: int
    status: int
    log: str


OwnerMessage = Fork | Signal
ZygoteMessage = Loaded | Forked | Exited

OWNER_MESSAGES: "msgspec.msgpack.Decoder[OwnerMessage]" = msgspec.msgpack.Decoder(OwnerMessage)
ZYGOTE_MESSAGES: "msgspec.msgpack.Decoder[ZygoteMessage]" = msgspec.msgpack.Decoder(ZygoteMessage)
