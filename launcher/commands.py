"""The commands of `shoal`: what each is for, its own arguments, and the settings it takes.

Light on purpose: help and usage errors need nothing else. Command X is run by `shoal.launcher.cmd_X`, imported once its
settings are known to be right:

    run(args, resolved) -> int    does the work, returns the exit status; exceptions go to the caller, which shows them
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

ALL_SECTIONS = ("parallel", "model", "cache", "scheduler", "runtime", "launcher")

_CHAT_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "bad_words",
    "logit_bias",
    "allowed_token_ids",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_GENERATE_SAMPLING = (*_CHAT_SAMPLING, "n", "logprobs", "prompt_logprobs", "detokenize")


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


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="A prompt; may be repeated.")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="Prompts from a file: one a line, or JSON objects in a .jsonl file (prompt, prompt_token_ids or messages, "
        "and sampling parameters); - reads standard input.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="Write JSON Lines (id, prompt, text, token_ids, finish_reason, usage) to a file.",
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.jsonl", help="Requests in OpenAI's batch format, one a line.")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.jsonl", help="Where answers are appended; those in it are kept."
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="A system message to begin the conversation with.")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="Also the settings that have their defaults.")
    parser.add_argument("--json", action="store_true", help="One JSON object on standard output, for programs.")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_count, default=2, metavar="N", help="Local processes to try. (default: 2)")
    parser.add_argument("--json", action="store_true", help="One JSON object on standard output, for programs.")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("latency", "throughput"), help="One request at a time, or all at once.")
    parser.add_argument("--input-len", type=_count, default=128, metavar="N", help="Prompt tokens. (default: 128)")
    parser.add_argument("--output-len", type=_count, default=64, metavar="N", help="Output tokens. (default: 64)")
    parser.add_argument("--num-prompts", type=_count, default=16, metavar="N", help="Requests. (default: 16)")
    parser.add_argument(
        "--dataset",
        choices=("fixed", "sharegpt-like"),
        default="fixed",
        help="Lengths: all alike, or spread as in ShareGPT conversations. (default: fixed)",
    )
    parser.add_argument("--json", metavar="FILE", help="Write every number to a file.")
    parser.add_argument("--plot", metavar="FILE", help="Draw the distributions of TTFT and ITL (needs matplotlib).")


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
    parser.add_argument("--replicas", type=_count, required=True, metavar="N", help="How many there shall be.")


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


def _count(text: str) -> int:
    """An argument's positive integer."""
    if not text.isdecimal() or not 1 <= int(text) <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return int(text)


_GENERATE = Command(
    name="generate",
    add_arguments=_add_generate,
    summary="text for prompts from the command line or a file",
    usage="generate MODEL -p TEXT [-p TEXT ...] [-tp N] [-pp N] [-dp N] [flags]",
    description="Writes what the model says after each prompt. The same --seed on the same layout gives the same text.",
    examples=(
        ('shoal generate demo -p "def main("', "the model that comes with Shoal"),
        ('shoal generate ./llama -tp 2 -pp 2 -p "Once" --max-tokens 64', "four processes"),
        ("shoal generate demo --config tp2_pp2 --prompts prompts.txt --output out.jsonl", "many prompts"),
        ('torchrun --nproc-per-node 4 -m shoal generate demo --config tp2_pp2 -p "..."', "processes by torchrun"),
    ),
    sampling=_GENERATE_SAMPLING,
    defaults={"sampling.max_tokens": "256, or less when the context ends"},
    default_model="demo",
)
_CHAT = Command(
    name="chat",
    add_arguments=_add_chat,
    summary="talk to a model in the terminal",
    usage="chat MODEL [--system TEXT] [flags]",
    description="A streaming chat that keeps its history. /reset forgets it, /stats shows speed and cache, /exit ends.",
    examples=(
        ("shoal chat demo", "the model that comes with Shoal"),
        ('shoal chat Qwen/Qwen3-0.6B --system "Answer briefly." --temperature 0.7', "a model from the hub"),
    ),
    sampling=_CHAT_SAMPLING,
    defaults={"sampling.max_tokens": "what the context holds"},
)
_BATCH = Command(
    name="batch",
    add_arguments=_add_batch,
    summary="a file of requests in OpenAI's batch format, answered",
    usage="batch IN.jsonl [MODEL] -o OUT.jsonl [flags]",
    description="Answers chats and completions of OpenAI's batch format. Killed and started again it goes on:\n"
    "no line is lost or answered twice. SIGTERM finishes what runs; a second one ends now.",
    examples=(
        ("shoal batch in.jsonl demo -o out.jsonl", "the model that comes with Shoal"),
        ("shoal batch in.jsonl -o out.jsonl --model ./llama --config tp2_dp2", "two replicas of two processes"),
    ),
    sampling=_GENERATE_SAMPLING,
    default_model="demo",
)
_EXPLAIN = Command(
    name="explain",
    add_arguments=_add_explain,
    summary="settings, who holds what, and memory, before anything is started",
    usage="explain MODEL [--config PATH|NAME] [-tp N] [-pp N] [-dp N] [flags]",
    description="Starts nothing. Prints every setting and where it came from, which rank holds which layers, heads, "
    "columns\nand experts, and the memory of each rank in bytes.",
    examples=(
        ("shoal explain demo --config tp2_pp2", "a shipped layout"),
        ("shoal explain ./llama -tp 3 --max-model-len 8192 --json", "for a program"),
    ),
    sampling=_GENERATE_SAMPLING,
    starts_engine=False,
)
_DOCTOR = Command(
    name="doctor",
    add_arguments=_add_doctor,
    summary="is this machine ready, and how fast is it",
    usage="doctor [flags]",
    description="Checks devices, versions, compiler and the collectives between local processes, measures memory "
    "bandwidth\nand GEMM rate, and says what to mend.",
    examples=(("shoal doctor", "everything"),),
    sections=("runtime", "launcher"),
    needs_model=False,
    starts_engine=False,
)
_BENCH = Command(
    name="bench",
    add_arguments=_add_bench,
    summary="latency or throughput, and the share of the machine's limits",
    usage="bench {latency,throughput} MODEL [flags]",
    description="Measures TTFT, TPOT, ITL, tokens/s and the engine's own time, beside memory bandwidth and GEMM rate "
    "of\nthe same run.",
    examples=(
        ("shoal bench latency demo --input-len 128 --output-len 64", "one request at a time"),
        ("shoal bench throughput demo --dataset sharegpt-like --num-prompts 100 --json out.json", "many at once"),
    ),
)

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

_ALL = (_GENERATE, _BATCH, _CHAT, _EXPLAIN, _DOCTOR, _BENCH, _UP, _STATUS, _LOGS, _SCALE, _DOWN)
COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
