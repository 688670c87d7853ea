"""The control channel: framed, typed messages between the processes of one launch, blocking side.

A frame is a 4-byte big-endian length, at most FRAME_LIMIT, and that many bytes of msgpack (msgspec, tagged structs).
Sockets come authenticated from `shoal.parallel.control_connect`; `shoal.parallel.control_async` is the same channel
for an event loop. Every wait takes a deadline, every failure is a ControlError that names the peer.
"""

import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

FRAME_LIMIT = 256 << 20
HEADER_BYTES = 4
READ_BYTES = 1 << 16
SEND_TIMEOUT_S = 30.0

Received = TypeVar("Received")


class ControlError(RuntimeError):
    """A control channel cannot be used: the text names the peer."""


class PeerGone(ControlError):
    """The peer closed the connection or died."""


class ControlTimeout(ControlError):
    """The peer did not send, take or answer in time."""


class BadFrame(ControlError):
    """The peer sent something that is not a message of this channel; the connection is of no further use."""


class WrongKey(ControlError):
    """The peer could not prove that it belongs to this launch."""


_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytes:
    """Header and payload of a message, ready for `Channel.send_frame` (encode once, send to many). Raises BadFrame
    over FRAME_LIMIT.
    """
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    size = len(frame) - HEADER_BYTES
    if size > FRAME_LIMIT:
        raise BadFrame(
            f"a {type(message).__name__} of {size} bytes exceeds the control channel's limit of {FRAME_LIMIT}"
        )
    frame[:HEADER_BYTES] = size.to_bytes(HEADER_BYTES, "big")
    return bytes(frame)


class FrameBuffer(Generic[Received]):
    """Turns received bytes into messages. A frame that is too large or does not decode raises BadFrame."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[Received]", peer: str) -> None:
        self._decoder, self.peer = decoder, peer
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Append what was read."""
        self._bytes += data

    def take(self) -> Received | None:
        """The next whole message, or None."""
        if len(self._bytes) < HEADER_BYTES:
            return None
        size = int.from_bytes(self._bytes[:HEADER_BYTES], "big")
        if size > FRAME_LIMIT:
            raise BadFrame(f"{self.peer} announced a frame of {size} bytes; the limit is {FRAME_LIMIT}")
        end = HEADER_BYTES + size
        if len(self._bytes) < end:
            return None
        payload = bytes(self._bytes[HEADER_BYTES:end])
        del self._bytes[:end]
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadFrame(f"{self.peer} sent a message that does not belong on this channel: {error}") from None

    @property
    def missing(self) -> int:
        """Bytes of the frame at the front that are yet to come; 0 when even its length is unknown."""
        if len(self._bytes) < HEADER_BYTES:
            return 0
        return HEADER_BYTES + int.from_bytes(self._bytes[:HEADER_BYTES], "big") - len(self._bytes)


class Channel(Generic[Received]):
    """A blocking end of a control channel. One thread receives; any thread sends.

    peer: how the other end is called in errors; may be set anew once it has introduced itself.
    """

    def __init__(self, sock: socket.socket, decoder: "msgspec.msgpack.Decoder[Received]", peer: str) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._buffer = FrameBuffer(decoder, peer)
        self._gone: str | None = None
        self._lock = threading.Lock()
        self._unsent = bytearray()  # rest of frames that the socket did not take; under _lock
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    @property
    def peer(self) -> str:
        """How the other end is called in errors."""
        return self._buffer.peer

    @peer.setter
    def peer(self, name: str) -> None:
        self._buffer.peer = name

    def fileno(self) -> int:
        """For selectors. Call `poll` when readable: it takes everything that is there."""
        return self._socket.fileno()

    @property
    def own_host(self) -> str | None:
        """The address of this end; None for a Unix socket."""
        if self._socket.family == socket.AF_UNIX:
            return None
        return str(self._socket.getsockname()[0])

    def send(self, message: msgspec.Struct, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send a message. Raises PeerGone, or ControlTimeout when the peer does not take it in time."""
        self.send_frame(encode_frame(message), timeout_s)

    def send_frame(self, frame: bytes, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send a frame made by `encode_frame`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._unsent += frame
            while not self._flush():
                self._wait(self._writable, deadline, timeout_s, "take a message")

    def push_frame(self, frame: bytes) -> bool:
        """Send what the peer takes now of this frame and of those before it; whether all is out. Go on with an empty
        frame.
        """
        with self._lock:
            self._unsent += frame
            return self._flush()

    def try_send(self, message: msgspec.Struct) -> bool:
        """Send without waiting; False when the peer is not taking messages, which then drops this one (heartbeats, log
        lines).
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if not self._flush():
                return False
            self._unsent += encode_frame(message)
            self._flush()
            return True
        finally:
            self._lock.release()

    def receive(self, timeout_s: float) -> Received:
        """The next message. Raises PeerGone, ControlTimeout, BadFrame."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._buffer.take()
            if message is not None:
                return message
            if self._gone is not None:
                raise PeerGone(self._gone)
            if not self._fill():
                self._wait(self._readable, deadline, timeout_s, "send a message")

    def poll(self) -> list[Received]:
        """Every message that is already here, without waiting. Raises PeerGone once the peer is gone and all it sent
        was taken.
        """
        while self._gone is None and self._fill():
            pass
        messages = list(self._messages())
        if not messages and self._gone is not None:
            raise PeerGone(self._gone)
        return messages

    def close(self) -> None:
        """Close the connection. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer, or an earlier close, was first
        self._socket.close()

    def release(self) -> None:
        """Let go of this process's copy only, after a fork; the connection lives on in the other process."""
        self._socket.close()

    def detach(self) -> tuple[socket.socket, FrameBuffer[Received]]:
        """The socket and what was already read from it, for another kind of channel; this one must not be used any
        more.
        """
        return self._socket, self._buffer

    def _messages(self) -> Iterator[Received]:
        while (message := self._buffer.take()) is not None:
            yield message

    def _fill(self) -> bool:
        """Read once; False when nothing was there."""
        try:
            data = self._socket.recv(max(READ_BYTES, min(self._buffer.missing, 1 << 20)))
        except BlockingIOError:
            return False
        except OSError as error:
            self._gone = f"{self.peer} is gone: {error.strerror or error}"
            return True
        if data:
            self._buffer.feed(data)
        else:
            self._gone = f"{self.peer} closed the connection"
        return True

    def _flush(self) -> bool:
        """Write what the socket takes; whether everything is out."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerGone(f"{self.peer} is gone: {error.strerror or error}") from None
            del self._unsent[:sent]
        return True

    def _wait(self, poller: Any, deadline: float, timeout_s: float, what: str) -> None:
        left = deadline - time.monotonic()
        if left > 0 and poller.poll(left * 1000):
            return
        if time.monotonic() >= deadline:
            raise ControlTimeout(f"{self.peer} did not {what} within {timeout_s:g} s")
