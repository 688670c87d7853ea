"""The command line: `shoal COMMAND ...`. Parses, loads the configuration, runs one command.

Exit status: 0 done, 1 failed, 2 usage or configuration, 130 interrupted (Ctrl-C), 143 ended by SIGTERM. Nothing heavy
is imported before a command is chosen and its settings are known to be right.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from shoal.configs.checks import is_torchrun
from shoal.configs.loader import load_config
from shoal.configs.problems import ConfigError, suggest
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.version import VERSION
from shoal.launcher.arguments import Parser, UsageError, add_model, add_settings, overrides_from, unknown_arguments
from shoal.launcher.command import EXIT_TERMINATED, Command, Terminated
from shoal.launcher.commands import COMMANDS
from shoal.launcher.failure import describe, show_failure, show_traceback
from shoal.launcher.kinds import is_follower

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_DESCRIPTION = """\
Runs one large language model across many GPUs and processes.
Any layout (tensor x pipeline x data), the same tokens."""
_OVERVIEW = """\
commands:
{commands}

examples:
  shoal generate demo -p "def main("                      text from the model that comes with Shoal
  shoal generate demo --config tp2_pp2 -p "def main("     the same tokens from four processes
  shoal explain demo -tp 2                                what would run where, before it runs
  shoal doctor                                            what this machine can do

`shoal COMMAND --help` lists a command's flags. MODEL is a folder, a Hugging Face hub id, or `demo`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own when None) and return the exit status. Failures are shown, not raised."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        return _run(arguments)
    except Terminated:
        print("shoal: ended by SIGTERM", file=sys.stderr)
        return EXIT_TERMINATED
    except SystemExit as error:  # --help of a command
        return error.code if isinstance(error.code, int) else 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _run(arguments: list[str]) -> int:
    debug = settable = False
    try:
        command = _chosen(arguments)
        if command is None:
            return 0
        settable = command.takes_settings
        args, resolved = _parse(command, arguments[1:])
        debug = resolved.config.runtime.log_level == "debug"
        _show_logs(resolved.config.runtime.log_level.upper())
        if command.starts_engine and is_follower(resolved.config, os.environ):
            return _follow(resolved)
        status: int = importlib.import_module(command.module).run(args, resolved)
        sys.stdout.flush()
        return status
    except UsageError as error:
        if _shows_usage():
            show_failure("usage", str(error), error.usage)
        return EXIT_USAGE
    except ConfigError as error:
        count = len(error.problems)
        title = "configuration" if count == 1 else f"configuration: {count} problems"
        if _shows_usage():
            show_failure(title, str(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\nshoal: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001  the last place that can show it
        if debug:
            show_traceback(error)
        is_users = isinstance(error, ValueError)
        hint = "" if is_users or debug or not settable else "--log-level debug prints the traceback."
        show_failure("cannot be used" if is_users else "failed", describe(error), hint)
        return EXIT_USAGE if is_users else EXIT_FAILED


def _show_logs(level: str) -> None:
    """Reports of this level on standard error: this program's, those of ranks included, not other libraries'."""
    logging.getLogger("shoal").setLevel(level)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(level)


def _follow(resolved: ResolvedConfig) -> int:
    """Be what world rank 0 under torchrun says. That process prints; this one says in a line why it cannot go on."""
    try:
        status: int = importlib.import_module("shoal.launcher.torchrun_follow").follow(resolved)
    except Exception as error:  # noqa: BLE001  as in _run
        if resolved.config.runtime.log_level == "debug":
            show_traceback(error)
        print(f"shoal: world rank {os.environ['RANK']}: {describe(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED
    return status


def _parse(command: Command, arguments: list[str]) -> tuple[argparse.Namespace, ResolvedConfig]:
    """The parsed arguments of a command and the checked settings."""
    parser = _command_parser(command)
    args, extras = parser.parse_known_args(arguments)
    if extras:
        raise UsageError(unknown_arguments(extras, parser.flags()), f"`shoal {command.name} --help` lists the flags.")
    overrides = overrides_from(args)
    resolved = load_config(args.config if command.takes_settings else None, overrides)
    if command.default_model is not None and resolved.config.model.path is None:
        resolved = load_config(args.config, {**overrides, "model.path": command.default_model})
        if _shows_usage():
            print(f"no MODEL is named: using {command.default_model}", file=sys.stderr)
    if command.needs_model and resolved.config.model.path is None:
        raise UsageError(
            "no model is named",
            f"Give a folder, a Hugging Face hub id, or `demo`: shoal {command.usage.replace('MODEL', 'demo', 1)}\n"
            "or write model.path into the file of --config.",
        )
    return args, resolved


def _chosen(arguments: list[str]) -> Command | None:
    """The command the first argument names; None when it asked for the overview or the version, which are printed."""
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return COMMANDS[first]
    overview = _overview()
    if first in ("-h", "--help"):
        overview.print_help()
        return None
    if first == "--version":
        print(f"shoal {VERSION}")
        return None
    if not first:
        raise UsageError("a command is missing", f"One of {', '.join(COMMANDS)}; `shoal --help` says more.")
    if first.startswith("-"):
        raise UsageError(unknown_arguments([first], overview.flags()), "The command comes first: shoal COMMAND [flags]")
    raise UsageError(f"there is no command {first}{suggest(first, COMMANDS)}", f"There are {', '.join(COMMANDS)}.")


def _overview() -> Parser:
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS.values())
    parser = Parser(
        prog="shoal",
        usage="shoal COMMAND [MODEL] [flags]",
        description=_DESCRIPTION,
        epilog=_OVERVIEW.format(commands=commands),
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    return parser


def _command_parser(command: Command) -> Parser:
    width = max(len(line) for line, _ in command.examples)
    examples = "\n".join(f"  {line:<{width}}  # {meaning}" for line, meaning in command.examples)
    parser = Parser(
        prog=f"shoal {command.name}",
        usage=f"shoal {command.usage}",
        description=command.description,
        epilog=f"examples:\n{examples}",
    )
    command.add_arguments(parser)
    if command.needs_model:
        add_model(parser)
    if command.takes_settings:
        add_settings(parser, command.sections, command.sampling, command.defaults)
    return parser


def _shows_usage() -> bool:
    """Whether this process tells of mistakes every rank sees alike: under torchrun the first one does."""
    return not is_torchrun(os.environ) or os.environ["RANK"] == "0"


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    """End like Ctrl-C does, running every `finally`; a second SIGTERM does not cut that short. Commands that serve take
    the signal over while they do (`shoal.launcher.draining`).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
