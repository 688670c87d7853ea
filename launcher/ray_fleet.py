"""RayFleet: the crews of all replicas on a Ray cluster: places them, has every host checked, makes replica handles.

A replica's place is kept while its actors answer, so that a rebuilt one starts from warm zygotes; when a node is gone
the replica is placed anew on what is there.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from shoal.configs.host import host_id
from shoal.configs.model_path import is_local
from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import WORKER, EngineBootstrap, Model, RankBootstrap, fingerprint, versions
from shoal.launcher.crew import Crew
from shoal.launcher.crew_messages import HOST_ANSWER, Assignment, HostQuery, HostRefused, HostReport
from shoal.launcher.placement import UNIT, HostOffer, Share, TooSmall, place_replicas
from shoal.launcher.ray_cluster import Actor, ActorSilent, Cluster, Node
from shoal.launcher.ray_places import Place, Post, end_crews, place_name, recover_places
from shoal.launcher.ray_replica import RayReplica
from shoal.launcher.settle import Host, Settled, for_place, settle
from shoal.model.checkpoint_digest import checkpoint_digest
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec
from shoal.parallel.control_connect import Listener, new_key

RESERVE_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 5.0
WAIT_FOR_DEVICES_S = 1.0
SUSPECT_S = 30.0  # a node whose crew did not answer gets nothing for so long: Ray notices a cut link late

logger = logging.getLogger("shoal")


class RayFleet:
    """Used from one event loop. `prepare` before `make`."""

    def __init__(
        self,
        cluster: Cluster,
        config: ShoalConfig,
        spec: DecoderSpec,
        model_dir: Path | None,
        worker: str = WORKER,
        name: str | None = None,
    ) -> None:
        """name: of a detached model, whose crews outlive this process; None when they end with it."""
        self._name = name
        self._cluster, self._spec, self._worker = cluster, spec, worker
        self._device = _choose_device(config, cluster.nodes())
        seed = secrets.randbits(62) if config.runtime.seed is None else config.runtime.seed
        runtime = msgspec.structs.replace(config.runtime, device=self._device, seed=seed)
        self._config = msgspec.structs.replace(config, runtime=runtime)
        self._query = HostQuery(config=self._config, spec=spec, model_path=portable(config, model_dir), worker=worker)
        weights = config.model.load_format != "dummy"
        self._checkpoint = "" if model_dir is None else checkpoint_digest(model_dir, weights)
        self._own = cluster.own_node()
        self._places: dict[int, Place] = {}
        self._suspects: dict[str, float] = {}
        self._settled: Settled | None = None
        self._adoptable: dict[int, EngineBootstrap] = {}
        self._placing = asyncio.Lock()

    @property
    def settled(self) -> Settled:
        """The settings without any "auto"; known once replicas have been prepared."""
        assert self._settled is not None, "prepare comes first"
        return self._settled

    async def prepare(self, numbers: Sequence[int]) -> None:
        """Place these replicas and have their hosts checked. Raises ValueError with the arithmetic when the cluster is
        too small or hosts differ, EngineError.
        """
        parallel, now = self._config.parallel, time.monotonic()
        nodes = [node for node in self._cluster.nodes() if self._suspects.get(node.node_id, now) <= now]
        offers = [_offer(node, UNIT[self._device]) for node in nodes]
        shares = place_replicas(offers, parallel.tensor, parallel.pipeline, numbers, self._device)
        names = {offer.host: offer.name for offer in offers}
        placing = [self._occupy(number, shares[number], names) for number in numbers]
        outcomes = await asyncio.gather(*placing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if self._settled is None:
            self._settled = self._settle()

    async def make(self, number: int) -> RayReplica:
        """A handle of a replica, not started: where it was, or on another place when that is gone; waits for devices
        at most launcher.start_timeout_s.
        """
        deadline, told = time.monotonic() + self._config.launcher.start_timeout_s, False
        while True:
            try:
                async with self._placing:
                    return await self._make(number)
            except TooSmall as error:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    logger.warning("replica %d waits for devices: %s", number, error)
                told = True
            await asyncio.sleep(WAIT_FOR_DEVICES_S)

    async def _make(self, number: int) -> RayReplica:
        if (engine := self._adoptable.pop(number, None)) is not None:
            handle = await self._adopt(engine, self._places[number])
            if handle is not None:
                return handle
        if number in self._places and not await self._answers(self._places[number]):
            self.release(number)
        if number not in self._places:
            await self.prepare([number])
        return self._handle(number, self._places[number])

    def release(self, number: int) -> None:
        """Give the devices of a replica back; its processes end. Unknown numbers are no error."""
        place = self._places.pop(number, None)
        if place is not None:
            for post in place.posts:
                post.actor.kill()
            self._cluster.release(place.reservation)

    def check(self, more: int) -> None:
        """Raise ValueError with the arithmetic when so many more replicas do not fit now."""
        parallel = self._config.parallel
        offers = [_offer(node, UNIT[self._device]) for node in self._cluster.nodes()]
        place_replicas(offers, parallel.tensor, parallel.pipeline, range(more), self._device)

    def release_all(self) -> None:
        """Give everything back."""
        for number in list(self._places):
            self.release(number)

    async def close(self) -> None:
        """Give everything back and leave the cluster."""
        self.release_all()
        await asyncio.to_thread(self._cluster.close)

    async def recover(self) -> list[int]:
        """Find what an earlier process of this name left; the numbers of the replicas whose crews are all there. Their
        engines are taken over by the first handles made of them.
        """
        assert self._name is not None, "only detached models outlive a process"
        for number, (place, engine) in (
            await recover_places(self._cluster, self._name, self._config.ranks_per_replica)
        ).items():
            self._places[number] = place
            if engine is not None:
                self._adoptable[number] = engine
                settled = Settled(config=engine.model.config, notes=[], ranks_per_device=engine.ranks_per_device)
                self._settled = self._settled or settled
        if self._places and self._settled is None:
            self._settled = self._settle()
        return sorted(self._places)

    async def _occupy(self, number: int, shares: list[Share], addresses: dict[str, str]) -> None:
        unit = UNIT[self._device]
        bundles = [(share.host, {unit: float(len(share.ranks))}) for share in shares]
        detached = self._name is not None
        name = place_name(self._name, number)
        if detached:
            end_crews(self._cluster, name)
        reservation = await self._cluster.reserve(bundles, name, detached, RESERVE_TIMEOUT_S)
        try:
            actors = [
                self._cluster.start_actor(
                    Crew,
                    (),
                    title=f"the crew of replica {number} on {addresses[share.host]}",
                    reservation=reservation,
                    bundle=index,
                    resources=bundles[index][1],
                    name=f"{name}/crew {index}" if detached else None,
                )
                for index, share in enumerate(shares)
            ]
            reports = await asyncio.gather(*(self._look(actor) for actor in actors))
        except BaseException:
            self._cluster.release(reservation)
            raise
        posts = [
            Post(ranks=share.ranks, node_id=share.host, address=addresses[share.host], actor=actor, report=report)
            for share, actor, report in zip(shares, actors, reports, strict=True)
        ]
        self._places[number] = Place(reservation=reservation, posts=posts)
        for index, post in enumerate(posts):
            assignment = Assignment(
                number=number,
                index=index,
                ranks=post.ranks,
                node_id=post.node_id,
                address=post.address,
                report=post.report,
            )
            await post.actor.call("assign", msgspec.msgpack.encode(assignment))

    async def _look(self, actor: Actor) -> HostReport:
        """What a crew says of its host, found fit. Raises ValueError, EngineError naming host, both values and fix."""
        timeout_s = self._config.launcher.start_timeout_s
        payload = msgspec.msgpack.encode(self._query)
        answer = HOST_ANSWER.decode(await actor.call("look", payload, timeout_s=timeout_s))
        if isinstance(answer, HostRefused):
            kind = ValueError if answer.users else EngineError
            raise kind(f"{actor.name}: {answer.text}")
        expected = {
            "runs other versions": (answer.versions, versions(), "install the same on every host"),
            "reads another model or other settings": (
                answer.config,
                fingerprint(self._config, self._spec),
                "install the same shoal and put the same checkpoint on every host",
            ),
            "has another checkpoint": (
                answer.checkpoint,
                self._checkpoint,
                "put the same files on every host, or on a shared file system",
            ),
        }
        for what, (got, wanted, fix) in expected.items():
            if got != wanted:
                raise ValueError(
                    f"{actor.name} (host {answer.name}) {what} than the front end: {got or 'none'}, expected "
                    f"{wanted or 'none'}; {fix}"
                )
        return answer

    async def _answers(self, place: Place) -> bool:
        """Whether all crews of a place are still there and free of old processes; nodes of those that do not answer are
        suspected for a while.
        """
        stops = (post.actor.call("stop", timeout_s=ANSWER_TIMEOUT_S) for post in place.posts)
        outcomes = await asyncio.gather(*stops, return_exceptions=True)
        for post, outcome in zip(place.posts, outcomes, strict=True):
            if isinstance(outcome, ActorSilent):
                self._suspects[post.node_id] = time.monotonic() + SUSPECT_S
        return not any(isinstance(outcome, BaseException) for outcome in outcomes)

    def _ranks_on(self, host: str) -> int:
        """Ranks of all replicas on a host."""
        posts = [post for place in self._places.values() for post in place.posts]
        return sum(len(post.ranks) for post in posts if post.report.host == host)

    def _host(self, places: Sequence[Place]) -> Host:
        """What the hosts of these replicas offer them all."""
        posts = [post for place in places for post in place.posts]
        shares = [(post.report.cores, self._ranks_on(post.report.host)) for post in posts]
        most = max(ranks for _, ranks in shares)
        return Host(
            gpus=most if self._device == "cuda" else 0,
            native=all(post.report.native for post in posts),
            ranks=most,
            one_host=all(place.one_host for place in places),
            cores=min(shares, key=lambda share: share[0] / share[1]),
            memory_nodes=max(post.report.memory_nodes for post in posts),
        )

    def _settle(self) -> Settled:
        """Resolve the settings for all replicas placed so far; later ones keep them, but for what their own place
        decides (`for_place`)."""
        return settle(self._config, self._spec, self._host(list(self._places.values())))

    def _handle(self, number: int, place: Place) -> RayReplica:
        settled, first = self.settled, place.posts[0]
        config = for_place(settled.config, self._config, self._host([place]), self._device)
        shards, key = shard_model(self._spec, config.parallel, config.model.quantization), new_key()
        assert config.runtime.threads is not None, "settled"
        listener = Listener.unix() if first.report.host == host_id() else Listener.tcp(self._own.address)
        config_fingerprint = fingerprint(self._config, self._spec)
        bootstrap = EngineBootstrap(
            replica=number,
            model=self._model(config, first),
            shards=shards,
            devices={rank: self._device_of(index) for index, rank in enumerate(first.ranks)},
            ranks_per_device=1 if self._device == "cuda" else max(self._ranks_on(p.report.host) for p in place.posts),
            threads=config.runtime.threads,
            front_address=listener.address,
            key=key,
            config_fingerprint=config_fingerprint,
            listen_host=None if place.one_host else first.address,
            grace_s=0.0 if self._name is None else config.launcher.controller_grace_s,
            hosts=place.addresses,
        )
        others = {
            post.actor: [
                RankBootstrap(
                    rank=rank,
                    model=self._model(config, post),
                    shard=shards[rank],
                    device=self._device_of(index),
                    threads=config.runtime.threads,
                    address="",  # known once the engine listens
                    key=key,
                    config_fingerprint=config_fingerprint,
                )
                for index, rank in enumerate(post.ranks)
            ]
            for post in place.posts[1:]
        }
        several = self._config.parallel.data > 1 or number > 0
        return RayReplica(
            first.actor,
            others,
            listener,
            bootstrap,
            addresses=place.addresses,
            crews=place.crews,
            where=f"replica {number}: " if several else "",
        )

    async def _adopt(self, engine: EngineBootstrap, place: Place) -> RayReplica | None:
        """A handle that takes over a running engine; None when that has ended meanwhile."""
        first = place.posts[0]
        listener = Listener.unix() if first.report.host == host_id() else Listener.tcp(self._own.address)
        try:
            await first.actor.call("adopt", listener.address)
        except EngineError as error:
            logger.warning("replica %d starts anew, its engine has not held out: %s", engine.replica, error)
            listener.close()
            return None
        bootstrap = msgspec.structs.replace(engine, front_address=listener.address)
        others: dict[Actor, list[RankBootstrap]] = {post.actor: [] for post in place.posts[1:]}
        where = f"replica {engine.replica}: "
        return RayReplica(
            first.actor,
            others,
            listener,
            bootstrap,
            addresses=place.addresses,
            crews=place.crews,
            where=where,
            adopted=True,
        )

    def _model(self, config: ShoalConfig, post: Post) -> Model:
        return Model(config=config, spec=self._spec, model_dir=post.report.model_dir, worker=self._worker)

    def _device_of(self, index: int) -> str:
        """Ray shows a crew its own GPUs only."""
        return f"cuda:{index}" if self._device == "cuda" else "cpu"


def _choose_device(config: ShoalConfig, nodes: Sequence[Node]) -> Literal["cpu", "cuda"]:
    gpus = sum(node.total["GPU"] for node in nodes)
    if config.runtime.device == "cuda" and gpus == 0:
        raise ValueError("runtime.device = cuda, but no node of the Ray cluster has a GPU; use auto or cpu")
    device: Literal["cpu", "cuda"] = "cpu" if config.runtime.device == "cpu" or gpus == 0 else "cuda"
    if device == "cuda" and config.parallel.ranks_per_device > 1:
        raise ValueError(
            f"parallel.ranks_per_device = {config.parallel.ranks_per_device}, but Ray gives every rank a GPU of its "
            "own; leave it out, or start with launcher.kind = local or torchrun"
        )
    return device


def _offer(node: Node, unit: str) -> HostOffer:
    return HostOffer(host=node.node_id, name=node.address, total=node.total[unit], free=node.free[unit])


def portable(config: ShoalConfig, model_dir: Path | None) -> str | None:
    """The model's path as every host can resolve it: demo and hub ids as they are, folders absolute."""
    path = config.model.path
    if model_dir is None or path is None:
        return None
    return str(model_dir.resolve()) if path != "demo" and is_local(path) else path
