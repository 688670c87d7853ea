"""A layout of one rank, in the calling process: no process is started, the engine runs in a thread."""

import asyncio
from pathlib import Path

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import Executor
from shoal.engine.inprocess_client import InprocessClient
from shoal.engine.work_thread import WorkThread
from shoal.launcher.capacity import make_capacity
from shoal.launcher.settle import Host, Settled, settle
from shoal.launcher.started import StartedEngine
from shoal.model.ledger import plan_cache
from shoal.model.ledger_table import format_ledger
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec


async def start_inprocess(config: ShoalConfig, spec: DecoderSpec, model_dir: Path) -> StartedEngine:
    """Load the model here. Raises ValueError (settings, checkpoint, memory) and EngineError."""
    thread = WorkThread()
    try:
        loading = thread.submit(lambda: load_inprocess(config, spec, model_dir))
        settled, executor, report = await asyncio.wrap_future(loading)
    except BaseException as error:
        thread.finish()
        if isinstance(error, RuntimeError | MemoryError | OSError):
            raise EngineError(f"the model could not be loaded: {type(error).__name__}: {error}") from error
        raise
    return StartedEngine(
        client=InprocessClient(EngineCore(settled.config, executor), thread),
        vocab_size=spec.vocab_size,
        max_model_len=executor.capacity.max_model_len,
        report="\n".join([*settled.notes, report]),
    )


def load_inprocess(config: ShoalConfig, spec: DecoderSpec, model_dir: Path) -> tuple[Settled, Executor, str]:
    """Everything up to an executor with its cache, and the memory table. Imports torch."""
    import torch

    from shoal.engine.inprocess_executor import InProcessExecutor
    from shoal.engine.worker import Worker
    from shoal.kernels.build import load_native
    from shoal.parallel.mesh import make_mesh

    gpus = 0 if config.runtime.device == "cpu" else torch.cuda.device_count()
    on_gpu = gpus > 0
    native = None if on_gpu else load_native(config.runtime.native)
    if config.runtime.threads is not None and not on_gpu:
        torch.set_num_threads(config.runtime.threads)  # only when asked for: it is the caller's process
    threads = torch.get_num_threads()
    config = msgspec.structs.replace(config, runtime=msgspec.structs.replace(config.runtime, threads=threads))
    settled = settle(config, spec, Host(gpus=gpus, native=native is not None, ranks=1))
    config = settled.config
    (shard,) = shard_model(spec, config.parallel, config.model.quantization)
    mesh = make_mesh("shm", 0, 1, 1, None, config.launcher.step_timeout_s, config.runtime.deterministic, native)
    worker = Worker(config, spec, shard, mesh, model_dir, torch.device("cuda:0" if on_gpu else "cpu"))
    worker.load(None)
    report = worker.profile()
    assert config.model.max_model_len is not None, "settled"
    plan = plan_cache(
        [report],
        spec.cache_windows,
        config,
        max_model_len=config.model.max_model_len,
        device_type=config.runtime.device,
        ranks_per_device=1,
    )
    worker.allocate_cache(plan.num_blocks)
    executor = InProcessExecutor(worker, make_capacity(plan, spec, max_in_flight=1, overlap=worker.overlaps))
    return settled, executor, format_ledger([report], [shard], config.cache.reserve, plan)
