"""The commands of `shoal`: what each is for, its own arguments, and the settings it takes.

Light on purpose: help and usage errors need nothing else. Command X is run by `shoal.launcher.cmd_X`, imported once its
settings are known to be right:

    run(args, resolved) -> int    does the work, returns the exit status; exceptions go to the caller, which shows them
"""

import argparse
from collections.abc import Mapping

from shoal.launcher.arguments import Once
from shoal.launcher.cluster_commands import CLUSTER_COMMANDS
from shoal.launcher.command import Command, count

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


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="A prompt; may be repeated.")
    parser.add_argument(
        "--prompts",
        action=Once,
        metavar="FILE",
        help="Prompts from a file: one a line, or JSON objects in a .jsonl file (prompt, prompt_token_ids or messages, "
        "and sampling parameters); - reads standard input.",
    )
    parser.add_argument(
        "--output",
        action=Once,
        metavar="FILE",
        help="Write JSON Lines (id, prompt, text, token_ids, finish_reason, usage) to a file.",
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.jsonl", help="Requests in OpenAI's batch format, one a line.")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.jsonl", help="Where answers are appended; those in it are kept."
    )


def _add_chaos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=_amount, default=2.0, metavar="X", help="How long faults go on. (default: 2)")
    parser.add_argument("--count", type=count, metavar="N", help="End after this many faults instead.")
    parser.add_argument("--pause", type=_amount, default=3.0, metavar="S", help="Mean seconds between. (default: 3)")
    parser.add_argument("--streams", type=count, default=16, metavar="N", help="Requests at a time. (default: 16)")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="Send at least so many. (default: 0)")
    parser.add_argument("--pool", type=count, default=64, metavar="N", help="Different requests. (default: 64)")
    parser.add_argument("--max-output", type=count, default=96, metavar="N", help="Longest output. (default: 96)")
    parser.add_argument(
        "--faults",
        default="kill-rank,kill-engine,stop-rank,stop-engine",
        metavar="KIND,...",
        help="Of kill-rank, kill-engine, stop-rank, stop-engine (default: these), and lose-host, for which it prints "
        "`lose ADDRESS` and waits for a line on standard input.",
    )
    parser.add_argument("--json", metavar="FILE", help="Write the report to a file.")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="A system message to begin the conversation with.")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="Also the settings that have their defaults.")
    parser.add_argument(
        "--gpu",
        action=Once,
        metavar="NAME",
        help="Plan for GPUs that are not here, as many as the layout needs, by their data sheet: h100, l4, ...",
    )
    parser.add_argument("--json", action="store_true", help="One JSON object on standard output, for programs.")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=count, default=2, metavar="N", help="Local processes to try. (default: 2)")
    parser.add_argument("--json", action="store_true", help="One JSON object on standard output, for programs.")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("latency", "throughput"), help="One request at a time, or all at once.")
    parser.add_argument("--input-len", type=count, default=128, metavar="N", help="Prompt tokens. (default: 128)")
    parser.add_argument("--output-len", type=count, default=64, metavar="N", help="Output tokens. (default: 64)")
    parser.add_argument("--num-prompts", type=count, default=16, metavar="N", help="Requests. (default: 16)")
    parser.add_argument(
        "--dataset",
        choices=("fixed", "sharegpt-like"),
        default="fixed",
        help="Lengths: all alike, or spread as in ShareGPT conversations. (default: fixed)",
    )
    parser.add_argument("--json", metavar="FILE", help="Write every number to a file.")
    parser.add_argument("--plot", metavar="FILE", help="Draw the distributions of TTFT and ITL (needs matplotlib).")


def _amount(text: str) -> float:
    """An argument's positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


_GENERATE = Command(
    name="generate",
    add_arguments=_add_generate,
    summary="text for prompts from the command line or a file",
    usage="generate MODEL -p TEXT [-p TEXT ...] [-tp N] [-pp N] [-dp N] [flags]",
    description="Writes what the model says after each prompt. The same --seed on the same layout gives the same text. "
    "\nSIGTERM finishes what runs; a second one ends now.",
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
    summary="settings, who holds what, memory and speed, before anything is started",
    usage="explain MODEL [--config PATH|NAME] [-tp N] [-pp N] [-dp N] [flags]",
    description="Starts nothing. Prints every setting and where it came from, which rank holds which layers, heads, "
    "columns\nand experts, the memory of each rank in bytes, and how fast that can be at most.",
    examples=(
        ("shoal explain demo --config tp2_pp2", "a shipped layout"),
        ("shoal explain ./llama -tp 3 --max-model-len 8192 --json", "for a program"),
        ("shoal explain ./llama -tp 4 --gpu h100", "for cards that are not here"),
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

_CHAOS = Command(
    name="chaos",
    add_arguments=_add_chaos,
    summary="a fault drill: kill and stop processes under load, compare every stream",
    usage="chaos MODEL [--config PATH|NAME] [--seed N] [--minutes X] [flags]",
    description="Kills and stops ranks and engines while streams decode; the schedule follows from --seed.\n"
    "Reports what was lost (nothing may be), what diverged (nothing may with --deterministic), and how soon\nit was "
    "mended.",
    examples=(
        ("shoal chaos demo --config tp2_dp2 --seed 7 --minutes 2 --deterministic", "two replicas of two ranks"),
        ("shoal chaos demo -pp 2 --count 20 --faults kill-rank --json report.json", "twenty kills"),
    ),
    default_model="demo",
)

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (_GENERATE, _BATCH, _CHAT, _EXPLAIN, _DOCTOR, _BENCH, _CHAOS, *CLUSTER_COMMANDS)
}
