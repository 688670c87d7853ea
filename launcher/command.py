"""Command: what a subcommand of `shoal` is, for `shoal.launcher.commands`. Light: help needs nothing else."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EXIT_TERMINATED = 143  # by SIGTERM, before everything was done
ALL_SECTIONS = ("parallel", "model", "cache", "scheduler", "runtime", "launcher")


class Terminated(SystemExit):
    """SIGTERM came. No Exception, so that no command mistakes it for a failure, nor for Ctrl-C."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand. usage: without the program's name. sections, sampling: the settings that are flags of it.

    starts_engine: under torchrun, the processes other than world rank 0 become ranks instead of running it.
    defaults: what help says instead of a setting's declared default, by key, where the command has one of its own.
    add_arguments: adds its own arguments. takes_settings: False for one without --config, --set and flags of settings.
    needs_model: it takes MODEL, and ends with a usage error without one, unless default_model says what is meant then.
    """

    name: str
    summary: str
    usage: str
    description: str
    examples: tuple[tuple[str, str], ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    sections: tuple[str, ...] = ALL_SECTIONS
    sampling: tuple[str, ...] = ()
    defaults: Mapping[str, str] = field(default_factory=dict)
    takes_settings: bool = True
    needs_model: bool = True
    default_model: str | None = None
    starts_engine: bool = True

    @property
    def module(self) -> str:
        """The module that holds `run`."""
        return f"shoal.launcher.cmd_{self.name}"


def count(text: str) -> int:
    """An argument's positive integer."""
    if not text.isdecimal() or not 1 <= int(text) <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return int(text)
