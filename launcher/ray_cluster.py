"""All that Shoal asks of Ray: join or start a cluster, see its nodes, reserve devices, start actors and call them.

The only file that imports ray, and only when a launch uses it. Ray places, starts, restarts and reports; requests,
plans and tokens never pass through it. Arguments and results of actor calls are bytes, texts and numbers.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shoal.engine.client import EngineError

NAMESPACE = "shoal"
MIN_OBJECT_STORE_BYTES = 80 << 20  # the smallest Ray takes; nothing of Shoal's goes there
AUTH_VARIABLE, TOKEN_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
AUTH_MODES = {"token": "token", "off": "disabled"}
START_HINT = "start one with `ray start --head` and give its address as host:port"
CONNECT_HINT = "is its head up (`ray start --head`), and is this the address it gave?"
TOKEN_HINT = "set RAY_AUTH_TOKEN to the cluster's (or RAY_AUTH_TOKEN_PATH, or put it in ~/.ray/auth_token)"
CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0


class ActorSilent(EngineError):
    """An actor did not answer in time: it is stopped, or the link to its node is cut."""


class JoinRefused(ValueError):
    """There is no cluster to join, or it does not let this process in: the user's to mend."""


class Node(NamedTuple):
    """A living node. total, free: whole devices of each resource, "CPU" and "GPU"."""

    node_id: str
    address: str
    total: dict[str, int]
    free: dict[str, int]


class Actor:
    """A handle to an actor whose class is a plain class of Shoal's."""

    def __init__(self, handle: Any, name: str) -> None:
        """name: how errors call it."""
        self._handle, self.name = handle, name

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The result of a method. Raises EngineError: it failed, its actor or node is gone; ActorSilent."""
        import ray.exceptions

        future = asyncio.wrap_future(getattr(self._handle, method).remote(*args).future())
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may lose a cancellation
                return await future
        except TimeoutError:
            raise ActorSilent(f"{self.name} did not answer ({method}) within {timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            raise EngineError(f"{self.name} failed in {method}: {error.cause or error}") from error
        except ray.exceptions.RayError as error:
            raise EngineError(f"{self.name} is gone: {_first_line(error)}") from None

    def kill(self) -> None:
        """End the actor's process now, for good. One that is gone is no error."""
        import ray

        ray.kill(self._handle, no_restart=True)


class Reservation(NamedTuple):
    """Devices held on nodes, one bundle a node, until `Cluster.release`."""

    group: Any
    name: str


class Cluster:
    """A connection of this process to a Ray cluster; one at a time."""

    def __init__(self, folder: str | None = None) -> None:
        """Inside an actor; elsewhere use `connect`. folder: of a cluster that ends with this process."""
        self._folder = folder

    @classmethod
    def connect(cls, address: str, auth: str, cpus: int | None) -> "Cluster":
        """Join the cluster at address, or start one here.

        address: "host:port" of a head; "local" for a cluster of this process; "auto" for RAY_ADDRESS or the one that
        runs on this machine, else as local. auth: "token" or "off", or "auto" to keep RAY_AUTH_MODE where it is set,
        else token. cpus: that a cluster started here says it has; None starts none. Raises ValueError (no ray, wrong
        address), EngineError.
        """
        named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
        if named not in (None, "auto", "local"):
            _require_answer(named, "RAY_ADDRESS" if address == "auto" else "launcher.address")
        _set_auth(auth)
        ray = _import_ray()
        if ray.is_initialized():
            raise ValueError("this process uses Ray already; one launch at a time can (ray.shutdown() ends the other)")
        quiet = {"logging_level": "error", "log_to_driver": False, "namespace": NAMESPACE}
        try:
            if address != "local" and cls._joined(ray, address, quiet):
                return cls()
            if cpus is None:
                raise JoinRefused(f"launcher.address = {address}: there is no Ray cluster to join; {START_HINT}")
            folder = tempfile.mkdtemp(prefix="shoal-ray-")
            with _environment_of_local_cluster():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=MIN_OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    **quiet,
                )
            return cls(folder)
        except ray.exceptions.AuthenticationError:
            raise ValueError(
                f"launcher.ray_auth = {auth}: no token was found; {TOKEN_HINT}, or join a cluster without tokens with "
                "--ray-auth off"
            ) from None
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, EngineError | JoinRefused):
                raise
            raise EngineError(f"cannot join a Ray cluster ({address}): {_first_line(error)}") from error

    @staticmethod
    def _joined(ray: Any, address: str, options: Mapping[str, Any]) -> bool:
        """Join; False when "auto" finds no cluster. Raises EngineError when a named one does not answer."""
        named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
        try:
            ray.init(address=address, **options)
            return True
        except ConnectionError as error:
            if named is None:
                return False
            if "InvalidAuthToken" in f"{error} {error.__cause__}":
                raise JoinRefused(_about_tokens(named)) from None
            raise EngineError(f"no Ray cluster answers at {named}: {_first_line(error)}; {CONNECT_HINT}") from error

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                _devices(node["Resources"]),
                _devices(free.get(node["NodeID"], {})),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def own_node(self) -> Node:
        """The node this process runs on."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return next(node for node in self.nodes() if node.node_id == node_id)

    async def reserve(
        self, bundles: Sequence[tuple[str, Mapping[str, float]]], name: str, detached: bool, timeout_s: float
    ) -> Reservation:
        """Hold resources, one bundle for each (node id, resources). detached: until released, whatever becomes of this
        process. Raises EngineError when they are not to be had in time.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group(
            [dict(resources) for _, resources in bundles],
            strategy="PACK",
            name=name if detached else "",
            lifetime="detached" if detached else None,
            bundle_label_selector=[{"ray.io/node-id": node_id} for node_id, _ in bundles],
        )
        if not await asyncio.to_thread(group.wait, timeout_s):
            remove_placement_group(group)
            raise EngineError(f"{name}: Ray did not give the devices within {timeout_s:g} s: {list(bundles)}")
        return Reservation(group, name)

    def release(self, reservation: Reservation) -> None:
        """Give devices back; actors on them end."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(reservation.group)

    def find_reservation(self, name: str) -> Reservation | None:
        """A detached reservation, or None."""
        from ray.util.placement_group import get_placement_group

        try:
            return Reservation(get_placement_group(name), name)
        except ValueError:
            return None

    def actor_names(self, prefix: str) -> list[str]:
        """Names of the named actors that live and begin so."""
        import ray.util

        return sorted(name for name in ray.util.list_named_actors() if name.startswith(prefix))

    def start_actor(
        self,
        kind: type,
        args: Sequence[Any],
        *,
        title: str,
        reservation: Reservation | None = None,
        bundle: int = 0,
        resources: Mapping[str, float] | None = None,
        name: str | None = None,
        restarts: int = 0,
    ) -> Actor:
        """Start an actor of a plain class; returns before it runs.

        resources: of its bundle, "CPU" and "GPU". name: makes it detached and findable. restarts: how often Ray starts
        it anew when it dies; -1 for always.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = dict(resources or {})
        options: dict[str, Any] = {
            "num_cpus": wanted.get("CPU", 0),
            "num_gpus": wanted.get("GPU", 0),
            "max_restarts": restarts,
            "max_concurrency": 64,
        }
        if name is not None:
            options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        if reservation is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                reservation.group, placement_group_bundle_index=bundle
            )
        return Actor(ray.remote(kind).options(**options).remote(*args), title)

    def find_actor(self, name: str, title: str) -> Actor | None:
        """A named actor, or None."""
        import ray

        try:
            return Actor(ray.get_actor(name, namespace=NAMESPACE), title)
        except ValueError:
            return None

    def close(self) -> None:
        """Leave the cluster, or end it, its logs too, when it was started here."""
        import ray

        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _import_ray() -> Any:
    try:
        import ray.exceptions
    except ImportError as error:
        raise ValueError(
            f'launcher.kind = ray needs the package ray: pip install "shoal[ray]" ({_first_line(error)})'
        ) from error
    return ray


def _set_auth(auth: str) -> None:
    """Set RAY_AUTH_MODE on purpose, before ray is imported. Raises ValueError when it is set to something else."""
    given = os.environ.get(AUTH_VARIABLE)
    if auth == "auto":
        os.environ.setdefault(AUTH_VARIABLE, AUTH_MODES["token"])
        return
    if given is not None and given.lower() != AUTH_MODES[auth]:
        raise ValueError(
            f"launcher.ray_auth = {auth}, but {AUTH_VARIABLE} is {given} in the environment; leave one of them out"
        )
    if "ray" in sys.modules and given is None:
        raise ValueError(f"launcher.ray_auth = {auth} must be set before ray is imported; set {AUTH_VARIABLE} instead")
    os.environ[AUTH_VARIABLE] = AUTH_MODES[auth]


def _about_tokens(address: str) -> str:
    """Why a cluster does not let this process in."""
    if os.environ[AUTH_VARIABLE].lower() != AUTH_MODES["token"]:
        return f"the cluster at {address} wants a token, and launcher.ray_auth is off; leave it out, and {TOKEN_HINT}"
    return f"the token that was found is not the one of the cluster at {address}; {TOKEN_HINT}"


def _require_answer(address: str, name: str) -> None:
    """Raise ValueError when this is no address, EngineError when nobody listens there; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or int(port) >= 1 << 16:
        raise ValueError(f"{name} = {address}: must be host:port of a cluster's head, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise EngineError(
            f"no Ray cluster answers at {name} = {address}: {error.strerror or error}; {CONNECT_HINT}"
        ) from error


@contextlib.contextmanager
def _environment_of_local_cluster() -> Iterator[None]:
    """What the processes of a cluster started here inherit: this process's module search path, and a token of their
    own where none is given.
    """
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ[AUTH_VARIABLE] == AUTH_MODES["token"]:
        os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(32))
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED"):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def keep_sigterm() -> None:
    """Put this process's handler of SIGTERM back in place, over the one Ray's core installs when it connects. Without
    effect outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _devices(resources: Mapping[str, float]) -> dict[str, int]:
    return {kind: int(resources.get(kind, 0)) for kind in ("CPU", "GPU")}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
