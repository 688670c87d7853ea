"""Bringing up the replicas of a launch, and the controller in front of them."""

from collections.abc import Awaitable, Callable, Sequence

from shoal.configs.schema import ShoalConfig
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.dispatch import Limits
from shoal.launcher.journal import Journal
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.replica import Progress, ReplicaFactory
from shoal.launcher.replica_messages import Ready
from shoal.launcher.replica_slot import RestartPolicy
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from shoal.launcher.settle import Settled
from shoal.launcher.started import StartedEngine


def controller_options(settled: Settled, *, rebuild: bool = True) -> ControllerOptions:
    """What the settings say of a controller. rebuild: a replica that failed can be started again."""
    config = settled.config
    assert config.model.max_model_len is not None, "settled"
    queued = config.scheduler.max_queued_requests
    return ControllerOptions(
        limits=Limits(
            max_model_len=config.model.max_model_len,
            max_in_flight=queued + config.scheduler.max_num_seqs,
            max_waiting=queued,
            bounded_wait=config.scheduler.max_queue_wait_s is not None,
            max_unanswered=config.scheduler.max_num_seqs,
        ),
        restarts=RestartPolicy(max_restarts=config.launcher.max_restarts if rebuild else 0),
        start_timeout_s=config.launcher.start_timeout_s,
        drain_timeout_s=config.launcher.drain_timeout_s,
        seed=config.runtime.seed,
    )


def make_routing(config: ShoalConfig) -> Routing:
    """What launcher.routing says. Without a prefix cache there is nothing to route by but the load."""
    match config.launcher.routing:
        case "round_robin":
            return RoundRobin()
        case "prefix" if config.cache.enable_prefix_caching:
            return PrefixRouting(config.cache.block_size, config.launcher.load_factor)
        case _:
            return LeastLoaded()


def make_controller(
    factory: ReplicaFactory,
    count: int,
    settled: Settled,
    on_close: Callable[[], Awaitable[None]] | None = None,
    *,
    rebuild: bool = True,
    journal: Journal | None = None,
) -> Controller:
    """The controller of `count` replicas, as the settings want it. on_close, rebuild: see start_replicas. journal: see
    Controller.
    """
    options = controller_options(settled, rebuild=rebuild)
    return Controller(factory, count, options, make_routing(settled.config), on_close, journal)


async def start_replicas(
    factory: ReplicaFactory,
    settled: Settled,
    on_progress: Progress | None,
    on_close: Callable[[], Awaitable[None]],
    *,
    rebuild: bool = True,
) -> StartedEngine:
    """Start all replicas and wait until all take requests. on_close: called once everything is to end.

    Raises ValueError or EngineError, the first cause, after stopping every replica.
    """
    controller = make_controller(factory, settled.config.parallel.data, settled, on_close, rebuild=rebuild)
    readies = await controller.start(on_progress)
    max_model_len = min(ready.capacity.max_model_len for ready in readies)
    return StartedEngine(
        client=controller,
        vocab_size=readies[0].capacity.vocab_size,
        max_model_len=max_model_len,
        report="\n".join([*settled.notes, *_tables(readies)]),
    )


def _tables(readies: Sequence[Ready]) -> list[str]:
    """The memory table, once when all replicas are alike."""
    if all(ready.report == readies[0].report for ready in readies):
        return ([f"each of {len(readies)} replicas:"] if len(readies) > 1 else []) + [readies[0].report]
    return [f"replica {index}:\n{ready.report}" for index, ready in enumerate(readies)]
