"""Who starts the ranks: this process, local processes, torchrun, Ray. Light: the command line asks it first."""

from collections.abc import Mapping
from typing import Literal

from shoal.configs.checks import is_torchrun
from shoal.configs.schema import ShoalConfig

Kind = Literal["inprocess", "local", "torchrun", "ray"]


def choose_launcher(config: ShoalConfig, environ: Mapping[str, str]) -> Kind:
    """What launcher.kind comes to. environ: the process environment, for torchrun's variables."""
    kind = config.launcher.kind
    if config.launcher.attach is not None or (kind == "auto" and config.launcher.address != "auto"):
        return "ray"
    if kind != "auto":
        return kind
    if is_torchrun(environ):
        return "torchrun"
    return "inprocess" if config.world_size == 1 else "local"


def is_follower(config: ShoalConfig, environ: Mapping[str, str]) -> bool:
    """Whether this process takes its orders from world rank 0 (`shoal.launcher.torchrun_follow`)."""
    return choose_launcher(config, environ) == "torchrun" and environ["RANK"] != "0"
