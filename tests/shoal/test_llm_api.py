"""LLM and AsyncLLM as a user calls them, over the real engine loop with a fake executor."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from shoal import LLM, AsyncLLM, ConfigError, EngineError, QueueFull, RequestOutput, SamplingParams
from shoal.engine.fake_executor import Fault
from shoal.engine.fake_model import FakeModel
from tests.shoal import fake_engine
from tests.shoal.fake_engine import DEMO, MAX_MODEL_LEN, VOCAB_SIZE

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = fake_engine.module()
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    return stand_in


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = fake_engine.module(step_s=0.005)
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    return stand_in


@pytest.fixture
def llm(engine: ModuleType):
    with LLM(DEMO, seed=0) as model:
        yield model


def wait_for_no_threads() -> None:
    """Wait until no thread of ours is left."""
    deadline = time.monotonic() + 20
    while names := [thread.name for thread in threading.enumerate() if thread.name.startswith("shoal")]:
        assert time.monotonic() < deadline, names
        time.sleep(0.001)


def interrupt_when_running(engine: ModuleType) -> threading.Thread:
    """Send this process a Ctrl-C as soon as the engine runs a request."""

    def wait_and_interrupt() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if any(client._core.scheduler.running for client in engine.clients):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait_and_interrupt)
    thread.start()
    return thread


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"prompt number {number}" for number in range(20)]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    model, tokenizer = FakeModel(VOCAB_SIZE), llm.get_tokenizer()
    for output in outputs:
        ids = model.generate(output.prompt_token_ids, GREEDY, 12)
        assert output.outputs[0].token_ids == ids
        assert output.outputs[0].finish_reason == "length" and output.finished
        text = tokenizer.decode([*output.prompt_token_ids, *ids], skip_special_tokens=True)
        assert text.endswith(output.outputs[0].text)


def test_a_prompt_alone_is_a_list_of_one(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    for prompt in ("hello", {"prompt": "hello"}, {"prompt_token_ids": ids, "cache_salt": "a"}, ids, ["hello"], [ids]):
        outputs = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert len(outputs) == 1 and outputs[0].outputs[0].token_ids == FakeModel(VOCAB_SIZE).generate(ids, GREEDY, 12)
    assert llm.generate([], GREEDY) == []


def test_every_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params, priority=[2, 1, 0])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    with pytest.raises(ValueError, match="sampling_params has 3 entries for 2 prompts"):
        llm.generate(["a", "b"], params)
    with pytest.raises(ValueError, match="sampling_params must be a SamplingParams or a list of them, found str"):
        llm.generate(["a"], "greedy")  # type: ignore[arg-type]


def test_seeds_make_sampling_reproducible(llm: LLM) -> None:
    seeded = SamplingParams(max_tokens=8, seed=5, ignore_eos=True, n=2)
    first, second = (llm.generate("a", seeded)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert first.outputs[0].token_ids != first.outputs[1].token_ids
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    assert llm.generate("a", free)[0].outputs[0].token_ids != llm.generate("a", free)[0].outputs[0].token_ids


def test_the_checkpoints_defaults_apply_without_parameters(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == llm.resolved.sampling_params()
    assert "generation_config.json" in llm.resolved.sources.values()


def test_a_bad_prompt_is_named_before_any_runs(llm: LLM, engine: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 of 3: the prompt is empty"):
        llm.generate(["a", {"prompt_token_ids": []}, "c"], GREEDY)
    with pytest.raises(ValueError, match=f"max_model_len is {MAX_MODEL_LEN}"):
        llm.generate({"prompt_token_ids": [1] * MAX_MODEL_LEN}, GREEDY)
    with pytest.raises(ValueError, match="prompts must be a prompt or a list of prompts, found int"):
        llm.generate(5, GREEDY)  # type: ignore[arg-type]
    assert engine.clients[0]._core.stats().prompt_tokens == 0


def test_chat_renders_the_template_and_keeps_its_special_tokens(llm: LLM) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt == llm.get_tokenizer().apply_chat_template(messages)
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt, add_special_tokens=False)
    both = llm.chat([messages, messages[1:]], GREEDY, use_tqdm=False)
    assert [one.prompt == output.prompt for one in both] == [True, False]
    with pytest.raises(ValueError, match="refuses the conversation: the role must be"):
        llm.chat([[{"role": "robot", "content": "x"}]], GREEDY)


def test_a_full_queue_is_waited_for(engine: ModuleType) -> None:
    with LLM(DEMO, max_queued_requests=2, max_num_seqs=1) as llm:
        assert len(llm.generate(["a"] * 9, GREEDY)) == 9


def test_skip_tokenizer_init_works_with_token_ids(engine: ModuleType) -> None:
    with LLM(DEMO, skip_tokenizer_init=True) as llm:
        output = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY)[0]
        assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.generate("text", GREEDY)


def test_stop_strings_end_the_request_at_the_engine(llm: LLM, engine: ModuleType) -> None:
    whole = llm.generate("a", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))[0].outputs[0]
    stop = whole.text[20:24]
    output = llm.generate("a", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=stop))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]


def test_keywords_are_those_of_the_declaration(engine: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"tensor_paralel_size.*did you mean tensor_parallel_size"):
        LLM(DEMO, tensor_paralel_size=2)
    with pytest.raises(ConfigError, match=r"no such folder"):
        LLM("/nowhere/at/all")
    assert engine.clients == []


def test_a_missing_model_is_named(engine: ModuleType) -> None:
    with pytest.raises(ValueError, match="no model is named"):
        LLM()


def test_an_engine_that_does_not_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_engine(*_: object) -> None:
        raise EngineError("rank 1: out of memory")

    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", ModuleType("bring_up"))
    monkeypatch.setattr(sys.modules["shoal.launcher.bring_up"], "start_engine", start_engine, raising=False)
    with pytest.raises(EngineError, match="rank 1: out of memory"):
        LLM(DEMO)
    wait_for_no_threads()


def test_a_failing_engine_fails_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = fake_engine.module(fault=Fault(step=3, rank=0))
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    with LLM(DEMO) as llm:
        with pytest.raises(EngineError, match="rank 0: ended by a planned fault"):
            llm.generate(["a", "b"], GREEDY)


def test_shutdown_may_be_called_twice_and_ends_the_threads(engine: ModuleType) -> None:
    llm = LLM(DEMO)
    llm.generate("a", GREEDY)
    llm.shutdown()
    llm.shutdown()
    assert not engine.clients[0]._thread.is_alive()
    wait_for_no_threads()
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.generate("a", GREEDY)


def test_a_collected_model_ends_its_engine(engine: ModuleType) -> None:
    llm = LLM(DEMO)
    del llm
    gc.collect()
    assert not engine.clients[0]._thread.is_alive()


def test_ctrl_c_ends_the_requests_and_the_model_stays_usable(slow_engine: ModuleType) -> None:
    with LLM(DEMO) as llm:
        thread = interrupt_when_running(slow_engine)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(max_tokens=240, ignore_eos=True))
        thread.join()
        output = llm.generate("a", GREEDY)[0]
        assert len(output.outputs[0].token_ids) == 12
        stats = llm._runtime.loop.run(llm._runtime.engine.stats())
        assert stats[0].num_running == stats[0].num_waiting == 0


def test_several_threads_may_generate_at_once(llm: LLM) -> None:
    found: dict[int, list[RequestOutput]] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: llm.generate([f"thread {k}"] * 3, GREEDY)}))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(len(set(map(tuple, (o.outputs[0].token_ids for o in outputs)))) == 1 for outputs in found.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_that_the_model_is_the_parents(llm: LLM) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            llm.generate("a", GREEDY)
            text = b"no error"
        except RuntimeError as error:
            text = str(error).encode()
        llm.shutdown()
        os.write(write, text)
        os._exit(0)
    os.waitpid(child, 0)
    assert b"belongs to the parent process" in os.read(read, 1000)
    assert llm.generate("a", GREEDY)[0].finished
    os.close(read), os.close(write)


SCRIPT = """
from tests.shoal import fake_engine
engine = fake_engine.install({options})
from shoal import LLM, SamplingParams
llm = LLM(fake_engine.DEMO)
import atexit, threading
atexit.register(lambda: print("engine alive at exit:", engine.clients[0]._thread.is_alive()))
{body}
"""


def run_script(body: str, options: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script that made an LLM, without a __main__ guard and without shutting it down."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body, options=options)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_a_script_that_forgets_shutdown_ends_cleanly() -> None:
    done = run_script(
        "print(len(llm.generate('a', SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\nengine alive at exit: False\n", "")


def test_an_exception_in_a_script_ends_the_engine() -> None:
    done = run_script("raise SystemError('mine')")
    assert done.returncode == 1 and "SystemError: mine" in done.stderr
    assert done.stdout == "engine alive at exit: False\n"
    assert done.stderr.count("Traceback") == 1


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, shoal; light = set(sys.modules); shoal.LLM, shoal.AsyncLLM, shoal.SamplingParams\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'msgspec', 'tokenizers'} & light))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules)))\n"
        "print(dir(shoal) == sorted(shoal.__all__), shoal.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[:2] == ["[]", "[]"] and done.stdout.splitlines()[2].startswith("True "), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        import shoal

        _ = shoal.Llm  # type: ignore[attr-defined]


def run_async(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def test_async_streams_and_aborts(slow_engine: ModuleType) -> None:
    async def scenario() -> None:
        async with AsyncLLM(DEMO) as llm:
            texts, last = [], None
            async for last in llm.generate("a", GREEDY, "one"):
                texts.append(last.outputs[0].text)
            assert last is not None and len(last.outputs[0].token_ids) == 12 and texts[-1] == last.outputs[0].text
            long = SamplingParams(max_tokens=200, ignore_eos=True)
            async for output in llm.generate("b", long, "two", output_kind="delta"):
                last = output
                await llm.abort("two")
            assert last.finished and last.outputs[0].finish_reason == "abort"
            async for last in llm.chat([{"role": "user", "content": "hi"}], GREEDY, output_kind="final"):
                assert last.finished and last.prompt is not None
            assert llm.report == "memory: all of it"
            assert (await llm.stats())[0].num_running == 0
            await llm.check_health()
            assert llm.get_tokenizer().encode("a")

    run_async(scenario())


def test_async_streams_run_at_once_and_end_when_closed(slow_engine: ModuleType) -> None:
    async def one(llm: AsyncLLM, name: str) -> int:
        count = 0
        async for output in llm.generate(name, GREEDY):
            count = len(output.outputs[0].token_ids)
        return count

    async def scenario() -> None:
        llm = AsyncLLM(DEMO)
        assert await asyncio.gather(*(one(llm, name) for name in "abcd")) == [12] * 4  # started by the first request
        assert len(slow_engine.clients) == 1
        stream = llm.generate("e", SamplingParams(max_tokens=200, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        while (await llm.stats())[0].num_running:
            await asyncio.sleep(0.001)
        await llm.shutdown()
        await llm.shutdown()
        with pytest.raises(RuntimeError, match="shut down"):
            await anext(llm.generate("a"))

    run_async(scenario())


def test_async_surfaces_a_full_queue(slow_engine: ModuleType) -> None:
    async def scenario() -> None:
        async with AsyncLLM(DEMO, max_queued_requests=1, max_num_seqs=1) as llm:
            streams = [llm.generate("a", SamplingParams(max_tokens=200, ignore_eos=True)) for _ in range(4)]
            tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            assert any(isinstance(task.exception(), QueueFull) for task in done)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run_async(scenario())


def test_async_before_the_start_says_so(engine: ModuleType) -> None:
    llm = AsyncLLM(DEMO)
    with pytest.raises(RuntimeError, match="has not been started"):
        llm.get_tokenizer()
