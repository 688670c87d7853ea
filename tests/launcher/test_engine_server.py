"""What an engine process tells its front end when things happen at once."""

import os
from typing import Any

import pytest

from shoal.configs.loader import load_config
from shoal.engine.engine_core import EngineCore
from shoal.engine.fake_executor import FakeExecutor, Fault
from shoal.engine.messages import Failure, Submit
from shoal.launcher.engine_server import EngineServer
from shoal.launcher.fake_replica import fake_capacity
from shoal.launcher.replica_messages import Acknowledged, Outputs, Shutdown
from tests.launcher.harness import request


class Front:
    """A front end whose messages are all there already."""

    def __init__(self, fd: int, messages: list[Any]) -> None:
        self._fd, self._messages, self.heard = fd, messages, []

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> list[Any]:
        messages, self._messages = self._messages, []
        return messages

    def send(self, message: Any, timeout_s: float) -> None:
        self.heard.append(message)


class WatchedExecutor(FakeExecutor):
    """With a descriptor to wait on. All is readable: nothing waits."""

    fd: int

    def fileno(self) -> int:
        return self.fd


@pytest.fixture
def readable() -> Any:
    pipes = [os.pipe() for _ in range(2)]
    for _, writer in pipes:
        os.write(writer, b"x")
    yield [reader for reader, _ in pipes]
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)


def test_a_request_that_meets_a_death_is_answered_by_the_failure_not_refused(readable: list[int]) -> None:
    config = load_config().config
    executor = WatchedExecutor(fake_capacity(config))
    executor.fd = readable[1]
    executor.fault = Fault(step=0, rank=1, cause="killed by SIGKILL")
    front = Front(readable[0], [Submit(request=request([1, 2, 3]))])
    assert EngineServer(EngineCore(config, executor), front, executor).run() == 1
    assert front.heard == [Failure(rank=1, cause="killed by SIGKILL", detail="")]


class Leaving(Front):
    """Says Shutdown once it has heard so many deltas."""

    def poll(self) -> list[Any]:
        if sum(len(message.deltas) for message in self.heard if isinstance(message, Outputs)) >= 3:
            return [Shutdown()]
        return super().poll()


def test_a_request_that_gets_no_token_in_its_first_step_is_acknowledged_once(readable: list[int]) -> None:
    config = load_config(keywords={"max_num_seqs": 1}).config
    executor = WatchedExecutor(fake_capacity(config))
    executor.fd = readable[1]
    front = Leaving(readable[0], [Submit(request=request([1], 5, name)) for name in ("runs", "waits")])
    assert EngineServer(EngineCore(config, executor), front, executor).run() == 0
    kinds = [message for message in front.heard if isinstance(message, Acknowledged | Outputs)]
    assert isinstance(kinds[0], Outputs) and kinds[0].deltas[0].request_id == "runs"
    assert [message for message in kinds if isinstance(message, Acknowledged)] == [Acknowledged(request_ids=["waits"])]
    assert kinds[1] == Acknowledged(request_ids=["waits"])
