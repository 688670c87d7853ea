"""Settings that a command or an API cannot use: never ignored in silence."""

import logging
from collections.abc import Collection

from shoal.configs.problems import ConfigError, Problem, show
from shoal.configs.resolved import COMMAND_LINE, DEFAULT, KEYWORD, ResolvedConfig

DETACHED = ("launcher.controller_grace_s", "launcher.lease_s")
DRAINING = ("launcher.drain_timeout_s",)
CONTROLLER = tuple(f"launcher.{name}" for name in ("hang_timeout_s", "routing", "load_factor", "max_restarts"))

logger = logging.getLogger("shoal")


def check_idle(resolved: ResolvedConfig, keys: Collection[str], why: str, *, refuse: bool = True) -> None:
    """These settings have no effect here: `why`. Raises ConfigError for those on the command line or among Python
    keywords; a file may serve other commands as well, and one in it is warned of. refuse: False warns of all.
    """
    given = [key for key in keys if resolved.sources[key] != DEFAULT]
    here = [key for key in given if resolved.sources[key] in (COMMAND_LINE, KEYWORD)]
    if here and refuse:
        raise ConfigError([_problem(resolved, key, why) for key in here])
    if given:
        logger.warning("%s: no effect here: %s", ", ".join(given), why)


def _problem(resolved: ResolvedConfig, key: str, why: str) -> Problem:
    section, _, name = key.partition(".")
    value = getattr(getattr(resolved.config, section), name)
    return Problem(
        key=key, value=show(value), source=resolved.sources[key], message=f"would not be used: {why}; leave it out"
    )
