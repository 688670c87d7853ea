"""RayReplica: a replica whose engine and ranks are started by crews, each a Ray actor on one host."""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import EngineBootstrap, RankBootstrap
from shoal.launcher.crew_messages import ENDS, StartRanks
from shoal.launcher.engine_replica import EngineReplica
from shoal.launcher.ray_cluster import Actor
from shoal.launcher.replica import RankPlace
from shoal.launcher.replica_messages import ProcessPlace
from shoal.parallel.control_connect import Listener

WATCH_S = 20.0
EXPLAIN_WAIT_S = 1.5
LOOK_S = 0.3
STOP_WAIT_S = 5.0


class RayReplica(EngineReplica):
    """Made by a RayFleet. The first crew forks the engine and its ranks, the others theirs once the engine listens."""

    def __init__(
        self,
        engine_crew: Actor,
        others: Mapping[Actor, Sequence[RankBootstrap]],
        listener: Listener,
        bootstrap: EngineBootstrap,
        *,
        addresses: Mapping[int, str],
        crews: Mapping[int, Actor],
        where: str = "",
        adopted: bool = False,
    ) -> None:
        """others: the ranks of the other crews, without the engine's address. addresses: of the node of each rank.
        crews: of each rank, the engine's among them. adopted: the engine runs already and connects to the listener.
        """
        super().__init__(listener, bootstrap, where=where, on_listening=self._order_ranks)
        self._engine_crew, self._others, self._adopted = engine_crew, dict(others), adopted
        self._addresses, self._crews = addresses, crews
        self._orders: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[str] | None = None

    async def start(self) -> None:
        """Have the engine forked."""
        if not self._adopted:
            await self._engine_crew.call("start_engine", msgspec.msgpack.encode(self.bootstrap))
        self._watch = asyncio.create_task(self._engine_end())

    def _order_ranks(self, address: str) -> None:
        """The engine listens: have the other ranks forked."""
        for actor, ranks in self._others.items():
            order = StartRanks(ranks=[msgspec.structs.replace(rank, address=address) for rank in ranks])
            self._orders.append(asyncio.create_task(actor.call("start_ranks", msgspec.msgpack.encode(order))))

    async def _engine_end(self) -> str:
        """How the engine ended, once it has, or why that cannot be known."""
        while True:
            try:
                told = ENDS.decode(await self._engine_crew.call("ends", WATCH_S, timeout_s=2 * WATCH_S))
            except EngineError as error:
                return str(error)
            for ended in told.ends:
                if ended.name.startswith("engine"):
                    how, _, log = ended.how.partition("\n")
                    return f"the engine process {how} on {self._addresses[0]}\n{log}".strip()

    def how_ended(self) -> str | None:
        """From its crew; a crew that could not start its ranks counts as the end as well."""
        for order in self._orders:
            if order.done() and (error := order.exception()) is not None:
                return str(error)
        return self._watch.result() if self._watch is not None and self._watch.done() else None

    async def explain(self) -> str:
        """The crew's word follows the hangup closely."""
        if self._watch is not None:
            await asyncio.wait([self._watch], timeout=EXPLAIN_WAIT_S)
        return self.how_ended() or ""

    async def failed(self) -> EngineError:
        """The same; the engine sees only a hangup of a rank elsewhere, and that rank's crew knows more."""
        error = _on_host(await super().failed(), self._addresses)
        told = await asyncio.gather(*(self._ended_by_signal(actor) for actor in self._others))
        known = [text for texts in told for text in texts]
        return EngineError(f"{self._where}{'; '.join(known)}\n{error}") if known else error

    async def _ended_by_signal(self, actor: Actor) -> list[str]:
        """Which ranks of a crew something killed, or that the crew itself is gone."""
        try:
            ends = ENDS.decode(await actor.call("ends", LOOK_S, timeout_s=EXPLAIN_WAIT_S)).ends
        except EngineError as error:
            return [str(error)]
        return [f"{ended.name} of {actor.name}: {ended.how}" for ended in ends if ended.by_signal]

    def places(self) -> list[RankPlace]:
        """Hosts by the addresses of their nodes."""
        return [msgspec.structs.replace(place, host=self._addresses[place.rank]) for place in super().places()]

    async def _reach(self, rank: int | None, place: ProcessPlace, number: int) -> bool:
        """Through the crew on its host."""
        crew = self._engine_crew if rank is None else self._crews[rank]
        reached: bool = await crew.call("signal", place.pid, number, timeout_s=EXPLAIN_WAIT_S)
        return reached

    async def stop(self) -> None:
        """The same, and the crews kill what has not ended then."""
        await super().stop()
        tasks = [*self._orders, *([self._watch] if self._watch is not None else [])]
        for task in tasks:
            task.cancel()
        stops = (actor.call("stop", timeout_s=STOP_WAIT_S) for actor in (self._engine_crew, *self._others))
        await asyncio.gather(*tasks, *stops, return_exceptions=True)


def _on_host(error: EngineError, addresses: Mapping[int, str]) -> EngineError:
    """The same with the engine's host, when its first line names none."""
    first, _, rest = str(error).partition("\n")
    if any(address in first for address in addresses.values()):
        return error
    return EngineError(f"{first} (engine on {addresses[0]})\n{rest}".strip())
