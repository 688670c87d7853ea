"""Between two front ends: an engine without one keeps its ranks and waits to be told where the next one listens.

Requests of the old front end end (whoever holds them gives them in again with the tokens they have); weights and
prefix cache stay. Whoever tells comes from the same host and proves the replica's key.
"""

import hashlib
import time

import msgspec

from shoal.engine.engine_core import EngineCore
from shoal.engine.messages import Message
from shoal.parallel.control import Channel, ControlError, ControlTimeout
from shoal.parallel.control_connect import Listener, connect

ACCEPT_SLICE_S = 0.25
TELL_TIMEOUT_S = 5.0
RETRY_S = 0.1


class Adopt(Message, frozen=True, kw_only=True):
    """The next front end listens here, with the same key."""

    front_address: str


class Adopting(Message, frozen=True, kw_only=True):
    """The engine has heard it."""


_ADOPT: "msgspec.msgpack.Decoder[Adopt]" = msgspec.msgpack.Decoder(Adopt)
_ADOPTING: "msgspec.msgpack.Decoder[Adopting]" = msgspec.msgpack.Decoder(Adopting)


def hold_out(core: EngineCore, live: list[str], key: bytes, grace_s: float) -> str | None:
    """The address of the next front end; None when there was none within grace_s or a rank failed meanwhile.

    live: requests to end first.
    """
    core.abort(live)
    while core.has_work and core.failure is None:
        core.step()
    listener = Listener.unix(_name(key))
    deadline = time.monotonic() + grace_s
    try:
        while core.failure is None and time.monotonic() < deadline:
            core.check_executor()
            try:
                channel: Channel[Adopt] = listener.accept(key, _ADOPT, "the crew", ACCEPT_SLICE_S)
                adopt = channel.receive(TELL_TIMEOUT_S)
                channel.send(Adopting(), TELL_TIMEOUT_S)
                channel.close()
                return adopt.front_address
            except ControlError:
                continue
    finally:
        listener.close()
    return None


def adopt_engine(key: bytes, front_address: str, timeout_s: float) -> None:
    """Tell the engine with this key, on this host, where its next front end listens. Blocks.

    Tries until the engine has noticed that the old one is gone. Raises ControlTimeout.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            channel = connect(f"unix:@{_name(key)}", key, _ADOPTING, "the engine", TELL_TIMEOUT_S)
            channel.send(Adopt(front_address=front_address), TELL_TIMEOUT_S)
            channel.receive(TELL_TIMEOUT_S)
            channel.close()
            return
        except ControlError as error:
            if time.monotonic() >= deadline:
                raise ControlTimeout(
                    f"the engine did not take a new front end within {timeout_s:g} s: {error}"
                ) from None
        time.sleep(RETRY_S)


def _name(key: bytes) -> str:
    return "shoal-adopt-" + hashlib.sha256(b"adopt" + key).hexdigest()[:24]
