"""shoal chat: a conversation in the terminal, streamed.

    shoal chat MODEL

/reset forgets the conversation, /stats says what it holds and how fast the last answer came, /exit or Ctrl-D ends,
Ctrl-C stops the current answer. SIGTERM lets the current answer finish, at most launcher.drain_timeout_s; a second one
ends at once. Works with lines piped in, one message each.
"""

import argparse
import os
import sys
from contextlib import closing
from dataclasses import dataclass, field

from shoal.configs.checks import is_torchrun
from shoal.configs.resolved import DEFAULT, ResolvedConfig
from shoal.configs.sampling import SamplingParams
from shoal.launcher.draining import AnswerDrain
from shoal.launcher.loop_thread import LoopThread
from shoal.launcher.session import Session, open_session_shown
from shoal.server.outputs import RequestOutput
from shoal.server.tokenizer import Tokenizer

_HELP = """/reset  forget the conversation
/stats  tokens of the conversation, speed of the last answer
/exit   end (so does Ctrl-D); Ctrl-C stops the current answer
/help   this list"""


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Chat until the input ends; returns the exit status 0. Raises ValueError, EngineError, Terminated."""
    _check_sampling(resolved)
    loop = LoopThread("shoal-chat")
    try:
        session = loop.run(
            open_session_shown(resolved, lambda tokenizer: _check_template(tokenizer, args.system), drains=True)
        )
        try:
            drain = AnswerDrain(resolved.config.launcher.drain_timeout_s)
            if not is_torchrun(os.environ):  # which ends the ranks as well, at once
                drain.listen()
            Chat(loop, session, drain, args.system).talk()
        finally:
            loop.run(session.close())
    finally:
        loop.stop()
    return 0


def _check_sampling(resolved: ResolvedConfig) -> None:
    """Raise ValueError for a setting that has no meaning in a chat."""
    sampling = resolved.sampling_params()
    for name, usual in (("n", 1), ("logprobs", None), ("prompt_logprobs", None), ("detokenize", True)):
        if getattr(sampling, name) != usual:
            raise ValueError(f"sampling.{name} = {getattr(sampling, name)}: has no effect in a chat; leave it out")


def _check_template(tokenizer: Tokenizer | None, system: str | None) -> None:
    """Raise ValueError when the model cannot chat: no tokenizer, no chat template, or none for this system message."""
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer: leave skip_tokenizer_init out")
    tokenizer.apply_chat_template([*_opening(system), {"role": "user", "content": "hello"}])


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


@dataclass(slots=True)
class _LastAnswer:
    """What /stats tells about the last answer."""

    output: RequestOutput
    generated: int

    def __str__(self) -> str:
        metrics = self.output.metrics
        assert metrics is not None
        first, last = metrics.first_token_time, metrics.last_token_time
        line = f"last answer: {self.generated} tokens, {self.output.num_cached_tokens} prompt tokens from the cache"
        if first is None or last is None:
            return line
        line += f", first after {first - metrics.arrival_time:.3f} s"
        if self.generated > 1 and last > first:
            line += f", then {(self.generated - 1) / (last - first):.1f} tokens/s"
        return line


@dataclass(slots=True)
class Chat:
    """One conversation: reads lines, answers them, keeps both."""

    loop: LoopThread
    session: Session
    drain: AnswerDrain
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    _last: _LastAnswer | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = _opening(self.system)
        self._last = None

    def talk(self) -> None:
        """Read and answer until the input ends or /exit."""
        interactive = sys.stdin.isatty()
        if interactive:
            _enable_line_editing()
            print("/help lists the commands; Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                line = input("> ") if interactive else sys.stdin.readline()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # at the prompt: drop the line that was begun
                print()
                continue
            if not interactive and not line:
                return
            line = line.strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.reset()
            print("the conversation is empty")
        elif line == "/stats":
            print(self._stats())
        elif line == "/help":
            print(_HELP)
        else:
            print(f"unknown command {line.split()[0]}\n{_HELP}")

    def _answer(self, line: str) -> None:
        """Stream the answer to a line; both join the conversation, an interrupted answer as far as it came."""
        self.messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        generated = 0
        output = None
        try:
            front_end = self.session.front_end
            prompt = front_end.chat_prompt(self.messages)
            stream = front_end.generate(prompt, self._sampling(), special_tokens=False, output_kind="delta")
            with closing(self.loop.iterate(stream)) as outputs:
                for output in outputs:
                    self.drain.begun()
                    generated += len(output.outputs[0].token_ids)
                    pieces.append(output.outputs[0].text)
                    print(output.outputs[0].text, end="", flush=True)
        except ValueError as error:
            self.messages.pop()
            print(f"error: {error}\n(/reset begins a new conversation)", file=sys.stderr)
            self.drain.ended()
            return
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if output is not None:
            self._last = _LastAnswer(output, generated)
        self.drain.ended()

    def _sampling(self) -> SamplingParams:
        """The settings' parameters; an answer may take the rest of the context unless max_tokens was set."""
        resolved = self.session.resolved
        changes = {"max_tokens": None} if resolved.sources["sampling.max_tokens"] == DEFAULT else {}
        return resolved.sampling_params(**changes)

    def _stats(self) -> str:
        front_end = self.session.front_end
        tokens = 0
        if any(message["role"] != "system" for message in self.messages):
            try:
                text = front_end.chat_prompt(self.messages, add_generation_prompt=False)
            except ValueError as error:
                return f"the chat template refuses this conversation: {error}"
            assert front_end.tokenizer is not None
            tokens = len(front_end.tokenizer.encode(text, add_special_tokens=False))
        line = f"conversation: {len(self.messages)} messages, {tokens} of {front_end.max_model_len} tokens"
        return line if self._last is None else f"{line}\n{self._last}"


def _enable_line_editing() -> None:
    """History and editing in input(), where the platform has readline."""
    try:
        import readline  # noqa: F401 - importing it is what enables it
    except ImportError:
        pass
