"""Journal: what a detached controller has accepted and emitted, in a file, so that its successor goes on from there.

A record is a length, a checksum and a msgpack message, appended by one write: a killed writer leaves whole records and
at most one torn at the end, which is cut off. Writes are in the kernel's hands when a call returns, so they outlive the
process; they are on the disk SYNC_INTERVAL_S and a sync later, and outlive a host that loses power then: what is not is
torn, and cut off. The file stays bounded: what has ended is left out by rewriting it (`os.replace`)
when it grows past max_bytes, and new requests are refused while even that would not do.

Only what must be known before it is acknowledged raises an error that concerns the disk: a token or an end that could
not be kept costs a successor some computing, and is warned of once.
"""

import fcntl
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from shoal.engine.client import QueueFull
from shoal.engine.messages import Message, Request, TokenLogprobs
from shoal.launcher.disk_sync import DiskSync

HEADER_BYTES = 8
RECORD_LIMIT = 64 << 20
RETRY_S = 1.0
SYNC_INTERVAL_S = 0.05


class Accepted(Message, frozen=True, kw_only=True):
    """A request, with its seed and what it had emitted when it was accepted (again)."""

    request: Request


class Emitted(Message, frozen=True, kw_only=True):
    """Tokens of a request from absolute output position `start` on, about to be delivered."""

    request_id: str
    start: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


class Ended(Message, frozen=True, kw_only=True):
    """Nothing more will come of the request."""

    request_id: str


class Wanted(Message, frozen=True, kw_only=True):
    """How many replicas there shall be."""

    replicas: int


Entry = Accepted | Emitted | Ended | Wanted
_DECODER: "msgspec.msgpack.Decoder[Entry]" = msgspec.msgpack.Decoder(Entry)
_ENCODER = msgspec.msgpack.Encoder()

logger = logging.getLogger("shoal")


class Kept(msgspec.Struct):
    """A live request. token_ids, logprobs: its whole output so far (logprobs may be shorter: what was there before)."""

    request: Request
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)

    def resumed(self) -> Request:
        """The request as it goes on."""
        return msgspec.structs.replace(self.request, emitted_token_ids=list(self.token_ids))


def frame(entry: Entry) -> bytes:
    """A record. Raises ValueError over RECORD_LIMIT."""
    payload = _ENCODER.encode(entry)
    if len(payload) > RECORD_LIMIT:
        raise ValueError(f"a {type(entry).__name__} of {len(payload)} bytes exceeds the journal's limit {RECORD_LIMIT}")
    return len(payload).to_bytes(4, "big") + zlib.crc32(payload).to_bytes(4, "big") + payload


def read_records(data: bytes) -> tuple[list[Entry], int]:
    """The whole records at the front of a journal, and how many bytes they take: what follows is torn."""
    entries: list[Entry] = []
    at = 0
    while at + HEADER_BYTES <= len(data):
        size, checksum = int.from_bytes(data[at : at + 4], "big"), int.from_bytes(data[at + 4 : at + 8], "big")
        payload = data[at + HEADER_BYTES : at + HEADER_BYTES + size]
        if len(payload) < size or zlib.crc32(payload) != checksum:
            break
        try:
            entries.append(_DECODER.decode(payload))
        except msgspec.DecodeError:
            break
        at += HEADER_BYTES + size
    return entries, at


class JournalInUse(ValueError):
    """Another process writes it."""


class Journal:
    """One writer. live: the requests that have not ended, by id, those of an earlier writer included. wanted: how many
    replicas there shall be, None when nobody has said so. torn_bytes: what was cut off when it was opened.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 << 20) -> None:
        """Open, or make, a journal. Raises JournalInUse when another process writes it, OSError."""
        self.path, self.max_bytes = path, max_bytes
        self.live: dict[str, Kept] = {}
        self.wanted: int | None = None
        self._warned = False
        self._fd = self._open(path)
        self._sync = DiskSync(self._fd, SYNC_INTERVAL_S)
        try:
            _sync_folder(path)
            data = path.read_bytes()
            entries, whole = read_records(data)
            self.torn_bytes = len(data) - whole
            os.ftruncate(self._fd, whole)
            self._bytes = whole
            for entry in entries:
                self._apply(entry)
        except BaseException:
            os.close(self._fd)
            raise

    @staticmethod
    def _open(path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise JournalInUse(f"{path}: another controller writes this journal; end that one") from None
        return fd

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self._bytes

    def accepted(self, request: Request) -> None:
        """Keep a request; acknowledge it afterwards. One that is kept already, as it is, costs nothing. Raises
        QueueFull when live requests fill the journal, OSError.
        """
        kept = self.live.get(request.request_id)
        if kept is not None and kept.resumed() == request:
            return
        record = frame(Accepted(request=request))
        if self._bytes + len(record) > self.max_bytes:
            self.compact()
            if self._bytes + len(record) > self.max_bytes:
                raise QueueFull(
                    f"the journal holds {self._bytes} bytes of {len(self.live)} live requests, its limit is "
                    f"{self.max_bytes}: come back later",
                    RETRY_S,
                )
        self._append(Accepted(request=request), record)

    def emitted(
        self, request_id: str, start: int, token_ids: Sequence[int], logprobs: list[TokenLogprobs] | None = None
    ) -> None:
        """Keep tokens before they are delivered; those of unknown requests are not kept."""
        if request_id in self.live and token_ids:
            self._note(Emitted(request_id=request_id, start=start, token_ids=list(token_ids), logprobs=logprobs))

    def ended(self, request_id: str) -> None:
        """A request needs to be kept no longer; unknown ones are no error."""
        if request_id in self.live:
            self._note(Ended(request_id=request_id))
            self.live.pop(request_id, None)

    def want(self, replicas: int) -> None:
        """Keep how many replicas there shall be."""
        self._note(Wanted(replicas=replicas))

    def _note(self, entry: Entry) -> None:
        """Write what a successor can do without."""
        try:
            self._append(entry, frame(entry))
            self._compact_if_large()
        except OSError as error:
            if not self._warned:
                logger.warning("the journal is not whole, a restarted controller may compute some again: %s", error)
            self._warned = True

    def _append(self, entry: Entry, record: bytes) -> None:
        """One write. A short one (a full disk) is taken back, so that the file holds whole records."""
        try:
            self._write(self._fd, record)
        except OSError:
            os.ftruncate(self._fd, self._bytes)
            raise
        self._bytes += len(record)
        self._sync.written()
        self._apply(entry)

    def _write(self, fd: int, record: bytes) -> None:
        """All of it. Raises OSError."""
        written = os.write(fd, record)
        if written < len(record):
            raise OSError(f"{self.path}: the disk took {written} of {len(record)} bytes; is it full?")

    def _apply(self, entry: Entry) -> None:
        match entry:
            case Accepted():
                before = self.live.get(entry.request.request_id)
                logprobs = [] if before is None else before.logprobs
                self.live[entry.request.request_id] = Kept(
                    entry.request, list(entry.request.emitted_token_ids), logprobs
                )
            case Emitted() if entry.request_id in self.live:
                kept = self.live[entry.request_id]
                new = len(kept.token_ids) - entry.start
                if new >= 0:
                    kept.token_ids += entry.token_ids[new:]
                    kept.logprobs += (entry.logprobs or [])[new:]
            case Ended():
                self.live.pop(entry.request_id, None)
            case Wanted():
                self.wanted = entry.replicas

    def _compact_if_large(self) -> None:
        """Growing past the limit rewrites the file, unless nothing would be won by it."""
        if self._bytes > self.max_bytes and self._bytes > 2 * self._live_bytes_guess():
            self.compact()

    def _live_bytes_guess(self) -> int:
        tokens = sum(len(kept.request.prompt_token_ids) + len(kept.token_ids) for kept in self.live.values())
        logprobs = sum(len(kept.logprobs) for kept in self.live.values())
        return 300 * len(self.live) + 5 * tokens + 30 * logprobs

    def compact(self) -> None:
        """Write what is live to a new file, which takes the old one's place at once. Raises OSError."""
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.unlink(missing_ok=True)
        fd = self._open(temporary)
        try:
            size = 0
            for record in self._live_records():
                self._write(fd, record)
                size += len(record)
            os.fdatasync(fd)  # a name must not come to stand for what the disk does not hold
            os.replace(temporary, self.path)
        except BaseException:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        self._sync.switch(fd)  # from here on the old file has no name: what is written to it would be lost
        os.close(self._fd)
        self._fd, self._bytes = fd, size
        _sync_folder(self.path)

    def _live_records(self) -> Iterator[bytes]:
        if self.wanted is not None:
            yield frame(Wanted(replicas=self.wanted))
        for kept in self.live.values():
            yield from _records(kept)

    def close(self) -> None:
        """Have it on the disk, and unlock it. Idempotent."""
        if self._fd >= 0:
            self._sync.close()
            os.close(self._fd)
            self._fd = -1


def _sync_folder(path: Path) -> None:
    """Have the file's name on the disk. Raises OSError."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _records(kept: Kept) -> list[bytes]:
    """A live request as few records."""
    records = [frame(Accepted(request=kept.request))]
    start = len(kept.request.emitted_token_ids)
    if len(kept.token_ids) > start or kept.logprobs:
        new, logprobs = kept.token_ids[start:], kept.logprobs or None
        entry = Emitted(request_id=kept.request.request_id, start=start, token_ids=new, logprobs=logprobs)
        records.append(frame(entry))
    return records
