"""A front end over a scripted engine that answers in a tiny tokenizer's words; what tests of the front end share."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from shoal.server.front_end import FrontEnd
from shoal.server.outputs import RequestOutput
from shoal.server.tokenizer import Tokenizer
from tests.server.scripted_client import Script, ScriptedClient, in_chunks
from tests.server.tiny_tokenizers import built

TOKENIZER = Tokenizer(Backend.from_str(built("byte_level")), {"bos_token": "<s>", "eos_token": "</s>"})
TEXT = "the quick brown fox 😀 jumps\n\nUser: over"
EOS = TOKENIZER.eos_token_id
assert EOS is not None


def says(text: str, sizes: Sequence[int] = (1,), **ending: Any) -> Script:
    """An engine that answers every request with a text."""
    return lambda request: in_chunks(request, TOKENIZER.encode(text), sizes, **ending)


ANSWER = says(TEXT)


def front_end(script: Script = ANSWER, *, tokenizer: Tokenizer | None = TOKENIZER, **client: Any) -> FrontEnd:
    return FrontEnd(
        ScriptedClient(script, **client),
        tokenizer=tokenizer,
        vocab_size=TOKENIZER.vocab_size,
        max_model_len=128,
        eos_token_ids=[EOS],
        seed=1,
    )


def client_of(end: FrontEnd) -> ScriptedClient:
    assert isinstance(end.client, ScriptedClient)
    return end.client


def collect(end: FrontEnd, *args: Any, **options: Any) -> list[RequestOutput]:
    """All outputs of one request."""

    async def read() -> list[RequestOutput]:
        return [output async for output in end.generate(*args, **options)]

    return asyncio.run(asyncio.wait_for(read(), 30))
