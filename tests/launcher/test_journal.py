"""The journal: what was accepted and emitted is there after a kill at any byte; the file stays bounded."""

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.engine.client import QueueFull
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import OutputDelta, TokenLogprobs
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.dispatch import Limits
from shoal.launcher.fake_replica import FakeReplicas
from shoal.launcher.journal import Journal, Kept, read_records
from shoal.launcher.orphans import Orphans
from tests.launcher.controllers import QUICK, answer, settings
from tests.launcher.harness import collect, request, run, until, wait_until


@pytest.fixture(autouse=True)
def journals_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever forgets one leaves a thread that looks after its file."""
    made: list[Journal] = []
    real = Journal.__init__

    def remembering(self: Journal, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Journal, "__init__", remembering)
    yield
    for journal in made:
        journal.close()


def test_what_was_written_is_read_by_the_next_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    scored = [TokenLogprobs([5, 6], [-0.5, -1.0], [1, 2])]
    for name in ("a", "b", "c"):
        journal.accepted(request([1, 2, 3], 9, name))
    journal.emitted("a", 0, [5], scored)
    journal.emitted("a", 1, [6, 7])
    journal.emitted("a", 2, [7, 8])  # again, and one more
    journal.emitted("unknown", 0, [1])
    journal.ended("b")
    with pytest.raises(ValueError, match="another controller writes"):
        Journal(tmp_path / "j")
    journal.close()
    again = Journal(tmp_path / "j")
    assert list(again.live) == ["a", "c"] and again.torn_bytes == 0
    assert again.live["a"] == Kept(request([1, 2, 3], 9, "a"), [5, 6, 7, 8], scored)
    assert again.live["a"].resumed().emitted_token_ids == [5, 6, 7, 8]
    again.accepted(again.live["a"].resumed())
    assert again.live["a"].token_ids == [5, 6, 7, 8] and again.live["a"].logprobs == scored
    again.close()


def test_the_wanted_number_of_replicas_outlives_a_rewriting(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert journal.wanted is None
    journal.want(3)
    journal.want(2)
    journal.compact()
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.wanted == 2
    again.close()


def test_the_journal_is_its_owners_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.accepted(request([1], 9, "a"))
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600
    journal.compact()
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600
    journal.close()


def test_a_torn_or_damaged_end_is_cut_off_at_any_byte(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    ends = []
    for number in range(4):
        journal.accepted(request([number], 9, f"r{number}"))
        ends.append(journal.size_bytes)
    journal.close()
    data = (tmp_path / "j").read_bytes()
    for cut in range(len(data) + 1):
        entries, whole = read_records(data[:cut])
        assert whole == max([end for end in ends if end <= cut], default=0) and len(entries) == sum(
            e <= cut for e in ends
        )
    damaged = bytearray(data)
    damaged[ends[2] + 20] ^= 1
    (tmp_path / "j").write_bytes(damaged)
    again = Journal(tmp_path / "j")
    assert list(again.live) == ["r0", "r1", "r2"] and again.torn_bytes == len(data) - ends[2]
    again.accepted(request([9], 9, "new"))
    again.close()
    assert list(Journal(tmp_path / "j").live) == ["r0", "r1", "r2", "new"]


def test_the_file_stays_bounded_and_keeps_what_lives(tmp_path: Path) -> None:
    choose = random.Random(2)
    journal = Journal(tmp_path / "j", max_bytes=20_000)
    live: dict[str, list[int]] = {}
    for number in range(2000):
        name = f"r{number}"
        journal.accepted(request([1] * 20, 9, name))
        live[name] = []
        for name in choose.sample(sorted(live), min(3, len(live))):
            journal.emitted(name, len(live[name]), [number])
            live[name].append(number)
        while len(live) > 20:
            name = choose.choice(sorted(live))
            journal.ended(name)
            del live[name]
        assert (tmp_path / "j").stat().st_size == journal.size_bytes < 25_000
    journal.close()
    again = Journal(tmp_path / "j")
    assert {name: kept.token_ids for name, kept in again.live.items()} == live
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j"]


def test_a_journal_full_of_live_requests_refuses_new_ones(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", max_bytes=2000)
    with pytest.raises(QueueFull, match="live requests"):
        for number in range(100):
            journal.accepted(request([1] * 50, 9, f"r{number}"))
    for name in list(journal.live)[1:]:
        journal.ended(name)
    journal.accepted(request([2], 9, "new"))
    assert len(journal.live) == 2


async def controller_over(journal: Journal, step_s: float, limits: Limits | None = None) -> Controller:
    """A controller with one replica that writes this journal."""
    options = ControllerOptions(limits=limits or Limits(max_model_len=512), restarts=QUICK)
    controller = Controller(FakeReplicas(settings(), StepLatency(base_s=step_s)), 1, options, journal=journal)
    await controller.start()
    return controller


def test_a_new_controller_goes_on_from_the_journal_of_the_old_one(tmp_path: Path) -> None:
    """The old one is gone in the middle: what its file held then is all there is."""

    async def body() -> None:
        wanted = [request([3, number], 120, f"r{number}", logprobs=1) for number in range(3)]
        journal = Journal(tmp_path / "old")
        old = await controller_over(journal, 0.002)
        got: dict[str, list[int]] = {}

        async def read(index: int) -> None:
            async for delta in old.submit(wanted[index]):
                got.setdefault(delta.request_id, []).extend(delta.token_ids)

        readers = [asyncio.create_task(read(index)) for index in range(3)]
        await until(lambda: all(len(got.get(f"r{number}", [])) > 20 for number in range(3)), "tokens")
        (tmp_path / "new").write_bytes((tmp_path / "old").read_bytes())
        delivered = {name: list(tokens) for name, tokens in got.items()}
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await old.close()

        journal = Journal(tmp_path / "new")
        assert all(len(journal.live[name].token_ids) >= len(tokens) for name, tokens in delivered.items())
        new = await controller_over(journal, 0.001)
        orphans = Orphans(new, journal)
        orphans.start(grace_s=3.0)
        assert orphans.waiting == ["r0", "r1", "r2"]
        for each in wanted[:2]:
            tokens = delivered[each.request_id]
            deltas: list[OutputDelta] = []
            async for delta in orphans.submit(msgspec.structs.replace(each, emitted_token_ids=list(tokens))):
                assert delta.start == len(tokens)
                tokens += delta.token_ids
                deltas.append(delta)
            assert tokens == answer(each) and deltas[-1].finish_reason == "length"
            assert sum(len(delta.logprobs or []) for delta in deltas) == sum(len(delta.token_ids) for delta in deltas)
        await until(lambda: orphans.waiting == [], "the third to be given up")
        assert (await new.status()).accepted == 3
        other = request([4, 4], 5, "r2")  # its id is free again
        assert (await collect(orphans.submit(other)))[0] == answer(other)
        await orphans.close()
        assert journal.live == {}
        await new.close()

    run(body())


def test_an_orphan_is_not_given_to_another_request_of_its_id(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path / "j")
        journal.accepted(request([1, 2], 400, "a"))
        controller = await controller_over(journal, 0.001)
        orphans = Orphans(controller, journal)
        orphans.start(grace_s=30.0)
        await until(lambda: len(journal.live["a"].token_ids) > 3, "it to go on")
        other = request([3, 4], 5, "a")
        assert (await collect(orphans.submit(other)))[0] == answer(other)
        await orphans.close()
        await controller.close()

    run(body())


def test_what_was_accepted_is_not_refused_by_a_full_queue(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path / "j")
        wanted = [request([1, number], 20, f"r{number}") for number in range(6)]
        for each in wanted:
            journal.accepted(each)
        full = Limits(max_model_len=512, max_in_flight=1, max_waiting=1)
        controller = await controller_over(journal, 0.001, full)
        orphans = Orphans(controller, journal)
        orphans.start(grace_s=30.0)
        for each, (tokens, last) in zip(
            wanted, await asyncio.gather(*(collect(orphans.submit(each)) for each in wanted)), strict=True
        ):
            assert tokens == answer(each) and last.finish_reason == "length"
        assert (await controller.status()).refused == 0
        await orphans.close()
        await controller.close()

    run(body())


def test_a_request_is_not_accepted_when_it_cannot_be_kept(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path / "j", max_bytes=500)
        controller = await controller_over(journal, 0.001)
        with pytest.raises(QueueFull, match="journal"):
            await anext(controller.submit(request([1] * 400, 5, "large")))
        assert (await controller.status()).live_requests == 0
        await controller.close()

    run(body())


def test_a_disk_that_fills_while_rewriting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Journal(tmp_path / "j")
    kept.accepted(request([1, 2, 3], 9, "a"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="is it full"):
        kept.compact()
    with pytest.raises(OSError, match="is it full"):
        kept.accepted(request([4], 9, "b"))
    kept.emitted("a", 0, [7])  # its client gets the token all the same
    monkeypatch.undo()
    kept.emitted("a", 1, [8])  # after a gap: not kept
    kept.accepted(request([5], 9, "c"))
    kept.close()
    again = Journal(tmp_path / "j")
    assert list(again.live) == ["a", "c"] and again.torn_bytes == 0 and again.live["a"].token_ids == []
    again.close()


def test_writes_are_on_the_disk_soon_and_wait_for_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, go = threading.Event(), threading.Event()
    synced: list[bytes] = []

    def slow(fd: int) -> None:
        syncing.set()
        go.wait(20.0)
        synced.append((tmp_path / "j").read_bytes())

    monkeypatch.setattr(os, "fdatasync", slow)
    journal = Journal(tmp_path / "j")
    journal.accepted(request([1], 9, "a"))
    assert syncing.wait(20.0)
    journal.accepted(request([1], 9, "b"))
    assert not synced, "it did not wait"
    go.set()
    journal.close()
    entries, _ = read_records(synced[-1])
    assert len(entries) == 2 and synced[-1] == (tmp_path / "j").read_bytes()


def test_a_rewritten_journal_is_on_the_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fdatasync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    journal = Journal(tmp_path / "j")
    journal.want(2)
    journal.compact()
    journal.close()
    assert order.index("j.new") < order.index("replace")


def test_what_follows_a_rewriting_whose_folder_could_not_be_synced_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "j")
    journal.accepted(request([1], 9, "before"))
    with monkeypatch.context() as patch:
        patch.setattr("shoal.launcher.journal._sync_folder", lambda path: os.rmdir(path))  # which is no folder
        with pytest.raises(NotADirectoryError):
            journal.compact()
    journal.accepted(request([1], 9, "after"))
    journal.close()
    again = Journal(tmp_path / "j")
    assert [*again.live] == ["before", "after"]
    again.close()


@pytest.mark.parametrize("lost", [1, 8, 40, 200])
def test_what_a_power_loss_left_as_zeros_is_cut_off(tmp_path: Path, lost: int) -> None:
    journal = Journal(tmp_path / "j")
    for number in range(20):
        journal.accepted(request([1], 9, f"r{number}"))
    journal.close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-lost] + bytes(lost))
    again = Journal(tmp_path / "j")
    assert again.torn_bytes >= lost and list(again.live) == [f"r{number}" for number in range(len(again.live))]
    assert 20 > len(again.live) >= 20 - (lost // 50 + 1)
    again.close()


def test_a_disk_that_cannot_sync_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(fd: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    journal = Journal(tmp_path / "j")
    for name in ("a", "b"):
        journal.accepted(request([1], 9, name))
        wait_until(lambda: not journal._sync._dirty, "a sync")
    journal.close()
    assert caplog.text.count("may not outlive a host that loses power: input/output error") == 1
