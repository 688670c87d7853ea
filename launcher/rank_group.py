"""Bringing up the ranks of a replica: start those of this host, let all connect, agree, load, size the cache. The
engine's side; no torch.

    Hello (all alike?) -> Begin -> Loading ... Loaded -> Profile -> Profiled -> Allocate (the minimum) -> CacheReady
"""

import time
from collections.abc import Callable, Collection
from typing import TypeVar

import msgspec

from shoal.engine.executor import Capacity, ExecutorFailed
from shoal.engine.multi_rank_executor import MultiRankExecutor
from shoal.engine.rank_links import RankExit, RankLinks, RankRefused, Supervisor, end_with_stacks
from shoal.engine.rank_messages import (
    Allocate,
    Begin,
    CacheReady,
    FromRank,
    Loaded,
    Loading,
    Profile,
    Profiled,
)
from shoal.engine.rank_watch import patience_s
from shoal.launcher.bootstrap import EngineBootstrap, RankBootstrap
from shoal.launcher.capacity import make_capacity
from shoal.launcher.processes import ZygoteConnection, describe_exit
from shoal.launcher.rank_arrivals import RankArrivals, check_alike
from shoal.launcher.rendezvous import Rendezvous, make_rendezvous
from shoal.launcher.replica_messages import ProcessPlace, Starting
from shoal.launcher.stack_dump import dump_stacks
from shoal.launcher.zygote_messages import Exited
from shoal.model.ledger import MemoryReport, plan_cache
from shoal.model.ledger_table import format_ledger
from shoal.parallel.control import Channel
from shoal.parallel.control_connect import Listener

Answer = TypeVar("Answer", bound=msgspec.Struct)

RANK_ENTRY = "shoal.launcher.rank_process:main"
SEND_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 5.0
POLL_S = 0.25


def listed(ranks: Collection[int]) -> str:
    """For people."""
    return ", ".join(str(rank) for rank in ranks)


class LocalRanks(Supervisor):
    """The ranks this engine forked through the zygote."""

    def __init__(self, connection: ZygoteConnection) -> None:
        self._connection = connection
        self._ranks: dict[int, int] = {}

    def start(self, bootstrap: RankBootstrap) -> None:
        """Fork one rank."""
        payload = msgspec.msgpack.encode(bootstrap)
        process_id = self._connection.fork(f"rank {bootstrap.rank}", RANK_ENTRY, payload)
        self._ranks[process_id] = bootstrap.rank

    def fileno(self) -> int | None:
        """The zygote's channel."""
        return self._connection.fileno() if self._ranks else None

    def knows(self, rank: int) -> bool:
        """One of them."""
        return rank in self._ranks.values()

    def ended(self) -> list[RankExit]:
        """Ranks that ended, with their logs."""
        return [self._describe(exited) for exited in self._connection.poll()]

    def wait(self, timeout_s: float) -> None:
        """Until all ended."""
        self._connection.wait(list(self._ranks), timeout_s)

    def kill(self) -> list[RankExit]:
        """Those that still run."""
        return [self._describe(exited) for exited in self._connection.end(list(self._ranks), KILL_TIMEOUT_S)]

    def write_stacks(self, ranks: Collection[int], timeout_s: float) -> bool:
        """By a signal."""
        running, pids = self._connection.running, self._connection.pids
        found = [pids[each] for each, rank in self._ranks.items() if rank in ranks and each in running and each in pids]
        dump_stacks(found, timeout_s)
        return bool(found)

    def _describe(self, exited: Exited) -> RankExit:
        return RankExit(self._ranks[exited.process_id], describe_exit(exited), exited.log, exited.status < 0)


class RankGroup:
    """The ranks of one replica while they are brought up. `executor` does it all; each wait ends at start_timeout_s.

    places: where the ranks' processes run, by rank, once they have come.
    """

    def __init__(
        self,
        bootstrap: EngineBootstrap,
        connection: ZygoteConnection,
        listener: Listener,
        tell: Callable[[Starting], None],
    ) -> None:
        """tell: called with news every POLL_S or sooner; may raise to give up."""
        self._bootstrap, self._listener, self._tell = bootstrap, listener, tell
        self._config = bootstrap.model.config
        self._size = len(bootstrap.shards)
        self._supervisor = LocalRanks(connection)
        self._deadline = time.monotonic() + self._config.launcher.start_timeout_s
        self._channels: list[Channel[FromRank]] = []
        self._hosts: list[str] = []
        self.places: list[ProcessPlace] = []
        self._links: RankLinks | None = None
        self._rendezvous: Rendezvous | None = None

    def executor(self) -> tuple[MultiRankExecutor, str]:
        """Bring the ranks up; returns the executor and the memory table. Raises ExecutorFailed, ValueError."""
        try:
            for rank, device in self._bootstrap.devices.items():
                self._supervisor.start(self._rank_bootstrap(rank, device))
            channels = self._connected()
            limit_s = patience_s(self._config.launcher.hang_timeout_s)
            links = self._links = RankLinks(channels, self._supervisor, self._hosts, limit_s)
            self._rendezvous = make_rendezvous(self._config, self._bootstrap.listen_host)
            links.broadcast(Begin(rendezvous=self._rendezvous.address), SEND_TIMEOUT_S)
            self._gather(links, Loaded, "loading")
            links.broadcast(Profile(), SEND_TIMEOUT_S)
            capacity, report = self._sized(self._profiled(links))
            links.broadcast(Allocate(num_blocks=[group.num_blocks for group in capacity.groups]), SEND_TIMEOUT_S)
            self._gather(links, CacheReady, "allocating the cache")
        except BaseException as error:
            self.kill()
            if isinstance(error, RankRefused):
                raise ValueError(str(error)) from None
            raise
        finally:
            if self._rendezvous is not None:
                self._rendezvous.close()
        executor = MultiRankExecutor(
            links,
            capacity,
            sampling_rank=self._size - self._config.parallel.tensor,
            step_timeout_s=self._config.launcher.step_timeout_s,
            stop_timeout_s=self._config.launcher.stop_timeout_s,
        )
        return executor, report

    def kill(self) -> None:
        """End what there is of the group."""
        self._supervisor.kill()
        for channel in self._channels:
            channel.close()

    def _rank_bootstrap(self, rank: int, device: str) -> RankBootstrap:
        boot = self._bootstrap
        return RankBootstrap(
            rank=rank,
            model=boot.model,
            shard=boot.shards[rank],
            device=device,
            threads=boot.threads,
            address=self._listener.address,
            key=boot.key,
            config_fingerprint=boot.config_fingerprint,
            cores=boot.cores.get(rank, ()),
        )

    def _left(self, missing: Collection[int], what: str) -> float:
        """Seconds until the start's deadline, at most POLL_S. Raises ExecutorFailed past it: missing ranks did what."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            limit = self._config.launcher.start_timeout_s
            doing = "" if self._links is None else self._links.watch.doing()
            raise ExecutorFailed(
                f"the start took longer than launcher.start_timeout_s = {limit:g}: rank {listed(missing)} {what}",
                None,
                doing + end_with_stacks(self._supervisor, missing),
            )
        return min(left, POLL_S)

    def _connected(self) -> "list[Channel[FromRank]]":
        """A channel per rank, in order, once all have said Hello and are alike."""

        def left(missing: Collection[int]) -> float:
            self._tell(Starting(doing=f"waiting for rank {listed(missing)}"))
            return self._left(missing, "did not connect")

        arrivals = RankArrivals(self._listener, self._bootstrap.key, self._size, self._supervisor).wait(left)
        self._channels = [channel for channel, _ in arrivals]
        names = self._bootstrap.hosts
        hellos = [msgspec.structs.replace(hello, host=names.get(hello.rank, hello.host)) for _, hello in arrivals]
        check_alike(hellos, self._bootstrap.config_fingerprint)
        self._hosts = [hello.host for hello in hellos]
        self.places = [ProcessPlace(hello.host, hello.pid) for hello in hellos]
        return self._channels

    def _profiled(self, links: RankLinks) -> list[MemoryReport]:
        """Every rank's memory report, in rank order."""
        return [message.report for message in self._gather(links, Profiled, "the profiling step")]

    def _gather(self, links: RankLinks, kind: type[Answer], doing: str) -> list[Answer]:
        """One message of this kind from every rank, in rank order; progress is passed on meanwhile."""
        got: dict[int, Answer] = {}
        progress: dict[int, Loading] = {}
        while len(got) < self._size:
            missing = [rank for rank in range(self._size) if rank not in got]
            for rank, message in links.receive(self._left(missing, f"is not through with {doing}")):
                match message:
                    case Loading():
                        progress[rank] = message
                    case _ if isinstance(message, kind):
                        got[rank] = message
                    case _:
                        links.fail(f"sent a {type(message).__name__} while {doing}", rank)
            done, total = (sum(getattr(p, name) for p in progress.values()) for name in ("done", "total"))
            self._tell(Starting(doing=doing, done=done, total=total))
        return [got[rank] for rank in range(self._size)]

    def _sized(self, reports: list[MemoryReport]) -> tuple[Capacity, str]:
        """The replica's capacity, the minimum over its ranks, and the table that explains it."""
        config, spec = self._config, self._bootstrap.model.spec
        max_model_len = config.model.max_model_len
        assert max_model_len is not None, "settings are resolved before an engine starts"
        plan = plan_cache(
            reports,
            spec.cache_windows,
            config,
            max_model_len=max_model_len,
            device_type=config.runtime.device,
            ranks_per_device=self._bootstrap.ranks_per_device,
        )
        assert config.parallel.micro_batches is not None, "settled"
        capacity = make_capacity(plan, spec, max_in_flight=config.parallel.micro_batches)
        return capacity, format_ledger(reports, self._bootstrap.shards, config.cache.reserve, plan)
