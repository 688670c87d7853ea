"""Where control channels come from: listening, connecting, and the proof that both ends belong to one launch.

Addresses are text: `unix:@name` (Linux abstract sockets: no file to leave behind) and `tcp:host:port`. The handshake
is fixed-size bytes: each side sends a random challenge and answers the other's with HMAC-SHA256 under the launch's
key, the direction included, so that an answer cannot be reflected. It keeps strangers out; it does not encrypt what
follows.
"""

import hashlib
import hmac
import os
import secrets
import select
import socket
import struct
import time

import msgspec

from shoal.parallel.control import Channel, ControlError, ControlTimeout, PeerGone, Received, WrongKey

MAGIC = b"SHOAL-1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0


def new_key() -> bytes:
    """A random key for one launch."""
    return secrets.token_bytes(32)


def address_towards(host: str) -> str:
    """The address of this machine's interface that reaches host. Raises ControlError when there is none."""
    try:
        family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ControlError(f"no route to {host}: {error.strerror or error}") from None


class Listener:
    """A listening socket of one launch. address: what peers pass to `connect`."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self._socket, self.address = sock, address
        sock.setblocking(False)
        sock.listen(128)

    @classmethod
    def unix(cls, name: str | None = None) -> "Listener":
        """Listen on an abstract Unix socket, a fresh one without a name: one host, nothing in the file system. Raises
        ControlError when the name is taken.
        """
        name = name or f"shoal-{secrets.token_hex(12)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"\0{name}")
        except OSError as error:
            sock.close()
            raise ControlError(f"cannot listen on unix:@{name}: {error.strerror or error}") from None
        return cls(sock, f"unix:@{name}")

    @classmethod
    def tcp(cls, host: str = "127.0.0.1") -> "Listener":
        """Listen on a free TCP port of one interface. Raises ControlError when the address is not this machine's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.bind((host, 0))
        except OSError as error:
            sock.close()
            raise ControlError(f"cannot listen on {host}: {error.strerror or error}") from None
        return cls(sock, f"tcp:{host}:{sock.getsockname()[1]}")

    def fileno(self) -> int:
        """For selectors: readable when somebody connects."""
        return self._socket.fileno()

    def accept(
        self,
        key: bytes,
        decoder: "msgspec.msgpack.Decoder[Received]",
        peer: str,
        timeout_s: float,
        handshake_s: float | None = None,
    ) -> Channel[Received]:
        """The next peer that proves it holds the key; others are turned away and counted. Raises ControlTimeout.

        timeout_s: for all of it; with handshake_s, until somebody connects, who has that long to prove it then.
        """
        deadline = time.monotonic() + timeout_s
        refused: list[str] = []
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if not poller.poll(left * 1000):
                continue
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionError):
                continue  # it left again
            try:
                _check_user(sock)
                _prepare(sock)
                left = max(0.0, deadline - time.monotonic())
                _answer(sock, key, peer, min(HANDSHAKE_TIMEOUT_S, left) if handshake_s is None else handshake_s)
                return Channel(sock, decoder, peer)
            except (ControlError, OSError) as error:
                sock.close()
                refused.append(str(error))
        hint = f" ({len(refused)} connections were refused, the last: {refused[-1]})" if refused else ""
        raise ControlTimeout(f"{peer} did not connect to {self.address} within {timeout_s:g} s{hint}")

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._socket.close()


def connect(
    address: str, key: bytes, decoder: "msgspec.msgpack.Decoder[Received]", peer: str, timeout_s: float
) -> Channel[Received]:
    """Connect to a Listener. Raises PeerGone (nobody listens), WrongKey, ControlTimeout, ValueError (no address)."""
    sock = _connected(address, peer, timeout_s)
    try:
        _prepare(sock)
        _introduce(sock, key, peer, min(timeout_s, HANDSHAKE_TIMEOUT_S))
    except BaseException:
        sock.close()
        raise
    return Channel(sock, decoder, peer)


def _connected(address: str, peer: str, timeout_s: float) -> socket.socket:
    kind, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix" and rest.startswith("@"):
        family, target = socket.AF_UNIX, "\0" + rest[1:]
    elif kind == "tcp" and host and port.isdigit():
        family, target = (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))  # type: ignore[assignment]
    else:
        raise ValueError(f"control address {address!r} must be unix:@name or tcp:host:port")
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(target)
    except TimeoutError:
        sock.close()
        raise ControlTimeout(f"{peer} at {address} did not accept a connection within {timeout_s:g} s") from None
    except OSError as error:
        sock.close()
        raise PeerGone(f"{peer} does not listen at {address}: {error.strerror or error}") from None
    return sock


def _prepare(sock: socket.socket) -> None:
    """No delay for small frames, and the kernel notices a host that vanished."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


def _check_user(sock: socket.socket) -> None:
    """A Unix peer must be the same user."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        user = struct.unpack("3i", credentials)[1]
        if user != os.getuid():
            raise WrongKey(f"a process of user id {user} tried to connect")


def _proof(key: bytes, direction: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(key, MAGIC + direction + first + second, hashlib.sha256).digest()


def _introduce(sock: socket.socket, key: bytes, peer: str, timeout_s: float) -> None:
    """The connecting side: challenge, check the answer, answer."""
    deadline = time.monotonic() + timeout_s
    mine = secrets.token_bytes(NONCE_BYTES)
    _write(sock, MAGIC + mine, peer, deadline)
    reply = _read(sock, NONCE_BYTES + PROOF_BYTES, peer, deadline)
    theirs, proof = reply[:NONCE_BYTES], reply[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"listener", mine, theirs)):
        raise WrongKey(f"{peer} does not hold this launch's key")
    _write(sock, _proof(key, b"connector", theirs, mine), peer, deadline)


def _answer(sock: socket.socket, key: bytes, peer: str, timeout_s: float) -> None:
    """The listening side."""
    deadline = time.monotonic() + timeout_s
    hello = _read(sock, len(MAGIC) + NONCE_BYTES, peer, deadline)
    if hello[: len(MAGIC)] != MAGIC:
        raise WrongKey(f"{peer} does not speak this version of the control channel")
    theirs, mine = hello[len(MAGIC) :], secrets.token_bytes(NONCE_BYTES)
    _write(sock, mine + _proof(key, b"listener", theirs, mine), peer, deadline)
    if not hmac.compare_digest(_read(sock, PROOF_BYTES, peer, deadline), _proof(key, b"connector", mine, theirs)):
        raise WrongKey(f"{peer} does not hold this launch's key")


def _write(sock: socket.socket, data: bytes, peer: str, deadline: float) -> None:
    sock.settimeout(max(1e-3, deadline - time.monotonic()))
    try:
        sock.sendall(data)
    except TimeoutError:
        raise ControlTimeout(f"{peer} did not take part in the handshake in time") from None
    except OSError as error:
        raise PeerGone(f"{peer} left during the handshake: {error.strerror or error}") from None


def _read(sock: socket.socket, size: int, peer: str, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        sock.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            part = sock.recv(size - len(data))
        except TimeoutError:
            raise ControlTimeout(f"{peer} did not take part in the handshake in time") from None
        except OSError as error:
            raise PeerGone(f"{peer} left during the handshake: {error.strerror or error}") from None
        if not part:
            raise PeerGone(f"{peer} left during the handshake (another key?)")
        data += part
    return data
