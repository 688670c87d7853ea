"""The control channel on an asyncio event loop: the same frames, messages and errors as `shoal.parallel.control`."""

import asyncio
import time
from collections import deque
from typing import Generic, cast

import msgspec

from shoal.parallel.control import (
    SEND_TIMEOUT_S,
    BadFrame,
    Channel,
    ControlError,
    ControlTimeout,
    FrameBuffer,
    PeerGone,
    Received,
    encode_frame,
)

MAX_WAITING = 4096  # received messages nobody has taken; beyond it reading pauses, and the peer's socket fills


class _Frames(asyncio.Protocol, Generic[Received]):
    """Decodes what arrives, keeps it in order, wakes the one who waits."""

    def __init__(self, buffer: FrameBuffer[Received]) -> None:
        self.buffer = buffer
        self.messages: deque[Received] = deque()
        self.error: ControlError | None = None
        self.arrived, self.writable = asyncio.Event(), asyncio.Event()
        self.writable.set()
        self.transport: asyncio.Transport | None = None
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.data_received(b"")  # what the blocking channel had already read

    def data_received(self, data: bytes) -> None:
        self.buffer.feed(data)
        try:
            while (message := self.buffer.take()) is not None:
                self.messages.append(message)
        except BadFrame as error:
            self.fail(error)
            if self.transport is not None:
                self.transport.abort()
        if len(self.messages) > MAX_WAITING and not self.paused and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()
        if self.messages:
            self.arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:
        why = f"is gone: {exc}" if exc is not None else "closed the connection"
        self.fail(PeerGone(f"{self.buffer.peer} {why}"))

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def fail(self, error: ControlError) -> None:
        """Keep the first cause and wake everybody."""
        self.error = self.error or error
        self.arrived.set()
        self.writable.set()

    def pop(self) -> Received | None:
        """The next message, if there is one; reading goes on when it had paused."""
        if not self.messages:
            return None
        message = self.messages.popleft()
        if self.paused and len(self.messages) < MAX_WAITING // 2 and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()
        return message


class AsyncChannel(Generic[Received]):
    """An end of a control channel used from one event loop. Made by `adopt`."""

    def __init__(self, frames: _Frames[Received], transport: asyncio.Transport) -> None:
        self._frames, self._transport = frames, transport

    @classmethod
    async def adopt(cls, channel: Channel[Received]) -> "AsyncChannel[Received]":
        """Take over an authenticated blocking channel, which must not be used afterwards."""
        sock, buffer = channel.detach()
        frames = _Frames(buffer)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: frames, sock=sock)
        return cls(frames, transport)

    @property
    def peer(self) -> str:
        """How the other end is called in errors."""
        return self._frames.buffer.peer

    @property
    def error(self) -> ControlError | None:
        """Why the channel cannot be used any more, or None."""
        return self._frames.error

    def post(self, message: msgspec.Struct) -> None:
        """Send without waiting (buffered in memory). Raises PeerGone."""
        if self._frames.error is not None:
            raise self._frames.error
        self._transport.write(encode_frame(message))

    async def send(self, message: msgspec.Struct, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send, and wait while more than a little is unsent. Raises PeerGone, ControlTimeout."""
        self.post(message)
        if not self._frames.writable.is_set():
            try:
                async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may lose a cancellation
                    await self._frames.writable.wait()
            except TimeoutError:
                raise ControlTimeout(f"{self.peer} did not take a message within {timeout_s:g} s") from None
            if self._frames.error is not None:
                raise self._frames.error

    async def receive(self, timeout_s: float) -> Received:
        """The next message. Raises PeerGone, ControlTimeout, BadFrame, each after all earlier messages were taken."""
        deadline = time.monotonic() + timeout_s
        while (message := self._frames.pop()) is None:
            if self._frames.error is not None:
                raise self._frames.error
            self._frames.arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._frames.arrived.wait()
            except TimeoutError:
                raise ControlTimeout(f"{self.peer} did not send a message within {timeout_s:g} s") from None
        return message

    def close(self) -> None:
        """Close the connection; what was sent still goes out. Idempotent."""
        self._transport.close()
