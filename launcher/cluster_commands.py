"""The commands about models that stay on a Ray cluster: up, status, logs, scale, down."""

import argparse
from collections.abc import Callable

from shoal.launcher.command import Command, count


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="NAME", help="What the other commands call it.")


def _add_named(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="Of `shoal up --name`.")
    parser.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="The cluster. (default: auto)")
    parser.add_argument(
        "--ray-auth", choices=("auto", "token", "off"), default="auto", help="As launcher.ray_auth. (default: auto)"
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_named(parser)
    parser.add_argument("--json", action="store_true", help="One JSON object on standard output, for programs.")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_named(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="Go on until interrupted.")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    _add_named(parser)
    parser.add_argument("--replicas", type=count, required=True, metavar="N", help="How many there shall be.")


def _add_down(parser: argparse.ArgumentParser) -> None:
    _add_named(parser)
    parser.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="S", help="Seconds what runs gets to finish. (default: 30)"
    )


def _seconds(text: str) -> float:
    """An argument's number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 to 1000000, not {text}")
    return value


_UP = Command(
    name="up",
    add_arguments=_add_up,
    summary="start a model on a Ray cluster and leave it there",
    usage="up MODEL --name NAME [flags]",
    description="Returns when the model takes requests; `shoal generate MODEL --attach NAME` sends some.",
    examples=(
        ("shoal up demo --config ray_tp2_dp2 --name prod", "on the cluster of RAY_ADDRESS or of this machine"),
        ("shoal up ./llama -tp 4 --name llama --ray-address 10.0.0.1:6379", "on another"),
    ),
    starts_engine=False,
)


def _named(name: str, summary: str, description: str, example: str, add: Callable[..., None]) -> Command:
    """A command about a detached model."""
    return Command(
        name=name,
        add_arguments=add,
        summary=summary,
        usage=f"{name} NAME [flags]",
        description=description,
        examples=((example, "the model that was started with --name prod"),),
        takes_settings=False,
        needs_model=False,
        starts_engine=False,
    )


_STATUS = _named(
    "status",
    "replicas, ranks, hosts, devices, health and load of a model that is up",
    "Shows every replica with its ranks, hosts, devices, layers, health, queue, KV use, restarts and tokens/s.",
    "shoal status prod",
    _add_status,
)
_LOGS = _named("logs", "what a model that is up has logged", "Prints the last lines.", "shoal logs prod", _add_logs)
_SCALE = _named(
    "scale",
    "have more or fewer replicas of a model that is up",
    "New replicas come up; those that go finish what they run, within launcher.drain_timeout_s, or hand it over.",
    "shoal scale prod --replicas 3",
    _add_scale,
)
_DOWN = _named(
    "down",
    "end a model that is up",
    "Takes no new requests, lets what runs finish, ends everything.",
    "shoal down prod",
    _add_down,
)

CLUSTER_COMMANDS = (_UP, _STATUS, _LOGS, _SCALE, _DOWN)
