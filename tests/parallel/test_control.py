"""The control channel: framing, limits, deadlines, the handshake, and the same on an event loop."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from shoal.parallel import control
from shoal.parallel.control import (
    FRAME_LIMIT,
    BadFrame,
    Channel,
    ControlError,
    ControlTimeout,
    PeerGone,
    WrongKey,
    encode_frame,
)
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import Listener, address_towards, connect, new_key
from shoal.parallel.control_heartbeat import Heartbeat


class Ping(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A small message."""

    number: int


class Blob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A large one."""

    data: bytes


DECODER: "msgspec.msgpack.Decoder[Ping | Blob]" = msgspec.msgpack.Decoder(Ping | Blob)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run function in a thread; the returned function joins it and gives its result or raises its exception."""
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            outcome.append((None, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(20)
        assert outcome, "the other side hangs"
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return join


def pair(make: Callable[[], Listener] = Listener.unix) -> tuple[Channel, Channel]:
    """Both ends of an authenticated channel."""
    listener, key = make(), new_key()
    accepted = in_thread(lambda: listener.accept(key, DECODER, "the rank", 10))
    connecting = connect(listener.address, key, DECODER, "the engine", 10)
    listener.close()
    return accepted(), connecting


@pytest.fixture(params=[Listener.unix, Listener.tcp], ids=["unix", "tcp"])
def channels(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, Channel]]:
    """A pair over each kind of socket, closed at the end."""
    left, right = pair(request.param)
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_in_order_over_both_kinds_of_socket(channels: tuple[Channel, Channel]) -> None:
    left, right = channels
    for number in range(100):
        left.send(Ping(number))
    assert [right.receive(5).number for _ in range(100)] == list(range(100))
    right.send(Ping(7))
    assert left.receive(5) == Ping(7)


def test_a_frame_larger_than_the_sockets_buffers_arrives_whole(channels: tuple[Channel, Channel]) -> None:
    left, right = channels
    data = bytes(range(256)) * (32 << 10)
    sent = in_thread(lambda: left.send(Blob(data), 20))
    assert right.receive(20) == Blob(data)
    sent()


def test_poll_takes_what_is_there_and_does_not_wait() -> None:
    left, right = pair()
    assert right.poll() == []
    left.send(Ping(1))
    left.send(Ping(2))
    assert right.poll() == [Ping(1), Ping(2)]
    left.send(Ping(3))
    left.close()
    assert right.poll() == [Ping(3)]
    with pytest.raises(PeerGone, match="the engine closed"):
        right.poll()
    right.close()


def test_receive_gives_up_at_its_deadline_and_names_the_peer() -> None:
    left, right = pair()
    with pytest.raises(ControlTimeout, match=r"the engine did not send a message within 0\.05 s"):
        right.receive(0.05)
    left.close()
    right.close()


def test_send_gives_up_when_the_peer_takes_nothing_and_try_send_drops() -> None:
    left, right = pair()
    with pytest.raises(ControlTimeout, match=r"the engine did not take a message within 0\.1 s"):
        right.send(Blob(bytes(32 << 20)), 0.1)
    assert not right.try_send(Ping(1))
    left.close()
    right.close()


def test_try_send_never_tears_a_frame_apart() -> None:
    left, right = pair()
    sent = 0
    while right.try_send(Blob(bytes([sent % 251]) * 50_000)):
        sent += 1
    received = [left.receive(5).data for _ in range(sent - 1)]
    assert right.try_send(Ping(9)), "the queue was taken, so there is room again"
    received.append(left.receive(5).data)
    assert received == [bytes([index % 251]) * 50_000 for index in range(sent)]
    assert left.receive(5) == Ping(9)
    left.close()
    right.close()


def test_everything_sent_before_a_close_is_delivered_then_peer_gone() -> None:
    left, right = pair()
    left.send(Ping(1))
    left.close()
    assert right.receive(5) == Ping(1)
    with pytest.raises(PeerGone):
        right.receive(5)
    with pytest.raises(PeerGone):
        right.send(Ping(2))
        right.send(Ping(3))
    right.close()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ((FRAME_LIMIT + 1).to_bytes(4, "big"), "announced a frame of 268435457 bytes"),
        (b"\0\0\0\1\xc1", "does not belong on this channel"),
        (b"\0\0\0\0", "does not belong on this channel"),
        (b"\0\0\0\x0b\x81\xa4type\xa4Pong", "Pong"),
    ],
    ids=["oversized", "not msgpack", "empty", "unknown type"],
)
def test_a_bad_frame_is_refused_before_it_is_used(frame: bytes, message: str) -> None:
    left, right = pair()
    left.send_frame(frame)
    left.close()
    with pytest.raises(BadFrame, match=message):
        right.receive(5)
    right.close()


def test_an_unknown_field_is_refused() -> None:
    left, right = pair()
    payload = msgspec.msgpack.encode({"type": "Ping", "number": 1, "surplus": 2})
    left.send_frame(len(payload).to_bytes(4, "big") + payload)
    with pytest.raises(BadFrame, match="surplus"):
        right.receive(5)
    left.close()
    right.close()


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "FRAME_LIMIT", 100)
    with pytest.raises(BadFrame, match=r"a Blob of 2.. bytes exceeds"):
        encode_frame(Blob(bytes(200)))


def test_a_connection_with_another_key_is_refused_on_both_sides() -> None:
    listener, key = Listener.unix(), new_key()
    accepted = in_thread(lambda: listener.accept(key, DECODER, "rank 1", 1))
    with pytest.raises(WrongKey, match="the engine does not hold this launch's key"):
        connect(listener.address, new_key(), DECODER, "the engine", 5)
    with pytest.raises(ControlTimeout, match=r"rank 1 did not connect.*1 connections were refused"):
        accepted()
    listener.close()


def test_a_stranger_who_does_not_know_the_key_is_turned_away_and_the_right_peer_let_in() -> None:
    listener, key = Listener.tcp(), new_key()
    accepted = in_thread(lambda: listener.accept(key, DECODER, "rank 1", 20))
    host, port = listener.address.removeprefix("tcp:").split(":")
    for nonsense in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64), b"SHOAL-1\n" + bytes(64)):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(nonsense)
            stranger.settimeout(10)
            try:
                while stranger.recv(4096):
                    pass  # what the listener says until it hangs up
            except ConnectionError:
                pass
    right = connect(listener.address, key, DECODER, "the engine", 10)
    right.send(Ping(5))
    left = accepted()
    assert left.receive(5) == Ping(5)
    for closing in (left, right, listener):
        closing.close()


def test_a_peer_that_came_in_time_may_be_slow_to_prove_itself() -> None:
    listener, key = Listener.unix(), new_key()
    slow = socket.socket(socket.AF_UNIX)
    slow.connect("\0" + listener.address.removeprefix("unix:@"))
    with pytest.raises(ControlTimeout, match="1 connections were refused"):
        listener.accept(key, DECODER, "rank 1", 0.05)  # without a limit of its own the handshake shares the wait's
    slow.close()
    accepted = in_thread(lambda: listener.accept(key, DECODER, "rank 1", 10, handshake_s=20))
    right = connect(listener.address, key, DECODER, "the engine", 10)
    right.send(Ping(6))
    assert accepted().receive(5) == Ping(6)
    for closing in (right, listener):
        closing.close()


def test_nobody_listening_and_no_address_are_told_apart() -> None:
    with pytest.raises(PeerGone, match="the engine does not listen at unix:@shoal-nobody"):
        connect("unix:@shoal-nobody", new_key(), DECODER, "the engine", 1)
    with pytest.raises(ValueError, match="must be unix:@name or tcp:host:port"):
        connect("somewhere", new_key(), DECODER, "the engine", 1)


def test_the_interface_towards_loopback_is_loopback() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_heartbeats_are_sent_and_a_hangup_is_noticed_at_once() -> None:
    left, right = pair()
    gone = threading.Event()
    heart = Heartbeat(right, lambda: Ping(42), gone.set, interval_s=0.01)
    heart.start()
    assert left.receive(5) == Ping(42)
    assert left.receive(5) == Ping(42)
    left.close()
    assert gone.wait(5)
    heart.stop()
    heart.stop()
    right.close()


def test_an_event_loop_can_take_over_an_end() -> None:
    left, right = pair()
    left.send(Ping(1))
    assert right.receive(5) == Ping(1)
    left.send(Ping(2))
    left.send(Ping(3))

    async def body() -> None:
        channel = await AsyncChannel.adopt(right)
        assert [await channel.receive(5), await channel.receive(5)] == [Ping(2), Ping(3)]
        await channel.send(Ping(4))
        assert await asyncio.to_thread(left.receive, 5) == Ping(4)
        with pytest.raises(ControlTimeout):
            await channel.receive(0.02)
        left.send(Ping(5))
        left.close()
        assert await channel.receive(5) == Ping(5)
        with pytest.raises(PeerGone, match="the engine closed"):
            await channel.receive(5)
        with pytest.raises(PeerGone):
            channel.post(Ping(6))
        channel.close()

    asyncio.run(body())


def test_an_event_loop_pauses_a_flood_and_loses_nothing() -> None:
    left, right = pair()
    count = 20_000

    def flood() -> None:
        for number in range(count):
            left.send(Ping(number), 20)

    async def body() -> None:
        channel = await AsyncChannel.adopt(right)
        join = in_thread(flood)
        for number in range(count):
            assert await channel.receive(10) == Ping(number)
        await asyncio.to_thread(join)
        channel.close()

    asyncio.run(body())
    left.close()


def test_a_receive_that_is_cancelled_as_a_message_arrives_is_cancelled() -> None:
    """In the same turn of the loop: a start that was given up would wait on."""
    left, right = pair()

    async def body() -> None:
        channel = await AsyncChannel.adopt(right)
        frames = channel._frames
        for turns in range(4):
            receiving = asyncio.ensure_future(channel.receive(30))
            while not frames.arrived._waiters:
                await asyncio.sleep(0)
            frames.arrived.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(receiving, 5)
        channel.close()

    asyncio.run(body())
    left.close()


def test_an_event_loop_refuses_a_bad_frame() -> None:
    left, right = pair()

    async def body() -> None:
        channel = await AsyncChannel.adopt(right)
        left.send_frame(b"\0\0\0\1\xc1")
        with pytest.raises(BadFrame):
            await channel.receive(5)
        with pytest.raises(ControlError):
            channel.post(Ping(1))
        channel.close()

    asyncio.run(body())
    left.close()
