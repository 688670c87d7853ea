"""FrontEnd: from prompts to requests and from deltas to outputs; between the user's side (Python, command line, HTTP)
and an EngineClient.

    front_end = FrontEnd(client, tokenizer=tokenizer, vocab_size=32000, max_model_len=4096, eos_token_ids=[2])
    async for output in front_end.generate("text", SamplingParams(max_tokens=32), "request-1"):
        output.outputs[0].text

Tokenises, checks, fans n outputs out to n engine requests, detokenises, finds stop strings and ends the request at the
engine then.
"""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from shoal.configs.sampling import SamplingParams
from shoal.configs.sampling_check import check_sampling
from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.messages import Request
from shoal.server.outputs import RequestMetrics, RequestOutput
from shoal.server.prompts import Prompt, ReadyPrompt, check_options, read_prompt
from shoal.server.sequence_output import SequenceOutput
from shoal.server.tokenizer import Tokenizer

OutputKind = Literal["cumulative", "delta", "final"]
"""What each RequestOutput of a stream holds: everything so far, what is new, or one output at the end."""

_LONG_TEXT_CHARS = 1 << 15  # longer texts are tokenised off the event loop


@dataclass(slots=True, frozen=True)
class PreparedRequest:
    """A checked request: the prompt, the sampling parameters as the user gave them, one engine request per output."""

    request_id: str
    prompt: ReadyPrompt
    sampling: SamplingParams
    parts: list[Request]
    arrival: float


class FrontEnd:
    """Serves requests through one EngineClient, from one event loop.

    tokenizer: None works with token ids only. vocab_size, max_model_len: bounds of the model. eos_token_ids: what ends
    an output. default_sampling: for requests that give none. seed: makes the seeds drawn for requests without one
    reproducible.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        default_sampling: SamplingParams | None = None,
        seed: int | None = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = list(eos_token_ids)
        self.default_sampling = check_sampling(default_sampling or SamplingParams())
        self._checked: tuple[SamplingParams | None, SamplingParams] = None, self.default_sampling
        self._seeds = random.Random(seed)
        self._numbers = itertools.count()
        self._own = f"request-{secrets.token_hex(4)}"  # ids nobody chooses, also beside other front ends of an engine
        self._active: dict[str, tuple[list[str], list[SequenceOutput]]] = {}

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation; options as `ChatTemplates.render` has them. Prepare it with
        special_tokens=False: the template writes them. Raises ValueError without a tokenizer or a chat template, and
        for messages the template refuses.
        """
        if self.tokenizer is None:
            raise ValueError(
                "messages need a tokenizer, and there is none (skip_tokenizer_init): give prompt_token_ids"
            )
        return self.tokenizer.apply_chat_template(messages, **options)

    def prepare(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        special_tokens: bool = True,
    ) -> PreparedRequest:
        """Tokenise and check; nothing is sent. May be called from any thread.

        sampling: default_sampling when None. max_tokens beyond max_model_len less the prompt ends there, with
        finish_reason "length". priority: lower runs first. deadline_s: absolute time.time() that aborts the request.
        special_tokens: the tokenizer's are added to text. Raises ValueError for whatever cannot be served.
        """
        params = self._check_sampling(sampling or self.default_sampling)
        ready = read_prompt(prompt, self.tokenizer, self.vocab_size, self.max_model_len, special_tokens=special_tokens)
        if request_id is None:
            request_id = f"{self._own}-{next(self._numbers)}"
        check_options(request_id, priority, deadline_s)
        arrival = time.time()
        part = Request(
            request_id=request_id,
            prompt_token_ids=ready.token_ids,
            sampling=self._engine_sampling(params, len(ready.token_ids)),
            priority=priority,
            arrival=arrival,
            deadline_s=deadline_s,
            cache_salt=ready.cache_salt,
            eos_token_ids=self.eos_token_ids,
            bad_words_token_ids=self._bad_words(params),
        )
        parts = [part]
        if params.n > 1:
            parts = [
                msgspec.structs.replace(part, request_id=f"{request_id}#{k}", sample_index=k) for k in range(params.n)
            ]
        return PreparedRequest(request_id, ready, params, parts, arrival)

    def _check_sampling(self, params: SamplingParams) -> SamplingParams:
        """As check_sampling, for this model. Many requests come with the same object, which nobody can change unless
        there is a list or a dictionary in it.
        """
        given, checked = self._checked
        if params is not given:
            checked = check_sampling(params, self.vocab_size, self.max_model_len)
            if not any(isinstance(value, list | dict) for value in msgspec.structs.astuple(params)):
                self._checked = params, checked
        return checked

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        special_tokens: bool = True,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput]:
        """Serve one request; arguments as `prepare` and `run` have them. Closing the iterator aborts it.

        Raises ValueError (bad request), QueueFull (come back after retry_after_s), EngineError (the engine failed).
        """
        call = (prompt, sampling, request_id)
        options: dict[str, Any] = {
            "priority": priority,
            "deadline_s": deadline_s,
            "special_tokens": special_tokens,
        }
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if isinstance(text, str) and len(text) > _LONG_TEXT_CHARS:
            prepared = await asyncio.to_thread(self.prepare, *call, **options)
        else:
            prepared = self.prepare(*call, **options)
        async with aclosing(self.run(prepared, output_kind)) as outputs:
            async for output in outputs:
                yield output

    async def run(
        self, prepared: PreparedRequest, output_kind: OutputKind = "cumulative", *, patient: bool = False
    ) -> AsyncGenerator[RequestOutput]:
        """Submit a prepared request and stream its outputs. patient: each of its outputs waits by itself while the
        engine's queue is full, so that one of more outputs than the queue holds runs too. Raises as `generate` does.
        """
        if prepared.request_id in self._active:
            raise ValueError(f"request_id {prepared.request_id!r} is running already; ids of running requests differ")
        sequences = [
            SequenceOutput(k, prepared.sampling, self.tokenizer, prepared.prompt.token_ids, self.eos_token_ids)
            for k in range(len(prepared.parts))
        ]
        parts = prepared.parts
        self._active[prepared.request_id] = ([part.request_id for part in parts], sequences)
        if output_kind == "final" and not prepared.sampling.stop:  # a stop string is to end the request when it comes
            parts = [msgspec.structs.replace(part, joined=True) for part in parts]
        try:
            if len(sequences) == 1:
                updates = self._follow(parts[0], sequences[0], patient)
            else:
                updates = self._follow_all(parts, sequences, patient)
            reported = -1
            async with aclosing(updates):
                async for _ in updates:
                    version = sum(sequence.version for sequence in sequences)
                    if output_kind != "final" and version != reported:
                        reported = version
                        yield _report(prepared, sequences, only_new=output_kind == "delta")
            if output_kind == "final":
                yield _report(prepared, sequences, only_new=False)
        finally:
            del self._active[prepared.request_id]

    async def complete(self, prepared: PreparedRequest) -> RequestOutput:
        """Run a prepared request to its end, waiting while the engine's queue is full."""
        async with aclosing(self.run(prepared, "final", patient=True)) as outputs:
            async for output in outputs:
                return output
        raise AssertionError("a request ends with an output or an error")

    async def abort(self, request_id: str) -> None:
        """End a request: its stream gets a last output with finish_reason "abort". Unknown or finished ids are no
        error.
        """
        part_ids, _ = self._active.get(request_id, ([], []))
        await self.client.abort(part_ids)

    def has_begun(self, request_id: str) -> bool:
        """Whether a running request has given a token; False for one that does not run."""
        _, sequences = self._active.get(request_id, ([], []))
        return any(sequence.first_token_time is not None for sequence in sequences)

    async def _follow(self, part: Request, sequence: SequenceOutput, patient: bool) -> AsyncGenerator[None]:
        """Apply the deltas of one engine request, yielding after each; ends it at the engine when it ends here or is
        closed.
        """
        accepted = False
        while not accepted:
            stream = self.client.submit(part)
            try:
                async for delta in stream:
                    accepted = True
                    if sequence.apply(delta):
                        await self.client.abort([part.request_id])
                    yield
                    if sequence.finished:
                        return
                raise EngineError(f"request {part.request_id}: the engine's stream ended without a finish reason")
            except QueueFull as full:  # comes before the first delta, if it comes
                if not patient:
                    raise
                await asyncio.sleep(full.retry_after_s)
            finally:
                close = getattr(stream, "aclose", None)
                if close is not None:
                    await close()

    async def _follow_all(
        self, parts: list[Request], sequences: list[SequenceOutput], patient: bool
    ) -> AsyncGenerator[None]:
        """The same for the n outputs of a request, at once."""
        changed = asyncio.Event()

        async def follow(part: Request, sequence: SequenceOutput) -> None:
            async with aclosing(self._follow(part, sequence, patient)) as updates:
                async for _ in updates:
                    changed.set()

        tasks = [asyncio.ensure_future(follow(part, sequence)) for part, sequence in zip(parts, sequences)]
        for task in tasks:
            task.add_done_callback(lambda _: changed.set())
        running = True
        try:
            while running:
                await changed.wait()
                changed.clear()
                running = not all(task.done() for task in tasks)  # now: whoever reads may take long over what follows
                for task in tasks:
                    if task.done():
                        task.result()
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _engine_sampling(self, params: SamplingParams, prompt_length: int) -> SamplingParams:
        """What the engine gets: one output, a seed, a length that fits, and no strings (they are found here)."""
        room = self.max_model_len - prompt_length
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens = {params.min_tokens} does not fit: the prompt has {prompt_length} tokens and "
                f"max_model_len is {self.max_model_len}, which leaves {room}; lower min_tokens or shorten the prompt"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                "stop strings need a tokenizer, and there is none (skip_tokenizer_init): use stop_token_ids"
            )
        return msgspec.structs.replace(
            params,
            n=1,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop=None,
            bad_words=None,
        )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise ValueError("bad_words need a tokenizer, and there is none (skip_tokenizer_init)")
        found = self.tokenizer.bad_word_ids(params.bad_words)
        highest = max(map(max, found))
        if highest >= self.vocab_size:
            raise ValueError(
                f"bad_words: token id {highest} is outside the model's vocabulary of {self.vocab_size}; the tokenizer "
                "is not the model's"
            )
        return found


def _report(prepared: PreparedRequest, sequences: list[SequenceOutput], only_new: bool) -> RequestOutput:
    """The request's outputs, so far or what is new."""
    taken = [sequence.take(only_new) for sequence in sequences]
    finished = all(sequence.finished for sequence in sequences)
    firsts = [s.first_token_time for s in sequences if s.first_token_time is not None]
    lasts = [s.last_token_time for s in sequences if s.last_token_time is not None]
    return RequestOutput(
        request_id=prepared.request_id,
        prompt=prepared.prompt.text,
        prompt_token_ids=prepared.prompt.token_ids,
        outputs=[output for output in taken if output is not None],
        finished=finished,
        prompt_logprobs=sequences[0].prompt_logprobs,
        num_cached_tokens=max(sequence.num_cached_tokens for sequence in sequences),
        metrics=RequestMetrics(
            arrival_time=prepared.arrival,
            first_token_time=min(firsts, default=None),
            last_token_time=max(lasts, default=None),
            finished_time=time.time() if finished else None,
        ),
    )
