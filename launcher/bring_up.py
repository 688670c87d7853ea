"""start_engine: the one place that decides who starts the ranks (in this process, local processes, torchrun, Ray), and
does it.

A front end of several ranks imports no torch: the zygote does, while this process goes on. Whatever fails, nothing is
left running.
"""

import asyncio
import logging
import os
from pathlib import Path

from shoal.configs.resolved import ResolvedConfig
from shoal.configs.schema import RuntimeConfig
from shoal.launcher.idle_settings import CONTROLLER, check_idle
from shoal.launcher.kinds import choose_launcher
from shoal.launcher.replica import Progress
from shoal.launcher.started import StartedEngine
from shoal.model.checkpoint_files import check_headers, verify_checksums
from shoal.model.families import load_spec
from shoal.model.shard import shard_model

NO_CONTROLLER = "one rank in this process has no controller; launcher.kind = local has one"


async def start_engine(
    resolved: ResolvedConfig, model_dir: Path | None, on_progress: Progress | None = None
) -> StartedEngine:
    """Start what the settings ask for and wait until it takes requests, at most launcher.start_timeout_s.

    model_dir: the checkpoint's folder. on_progress: told what the start is doing. `client.close()` ends everything.
    Raises ValueError for what cannot be used (settings, checkpoint, memory, devices) and EngineError when a process
    fails; cancelling it, or any failure, ends what was started.
    """
    config = resolved.config
    if config.runtime.log_level != RuntimeConfig().log_level:  # only when asked for: it is the caller's process
        logging.getLogger("shoal").setLevel(config.runtime.log_level.upper())
    if model_dir is None:
        raise ValueError("model.path is not set: give a folder with config.json, a Hugging Face hub id, or demo")
    spec, family = await asyncio.to_thread(load_spec, model_dir)
    if config.model.load_format != "dummy":  # refused here, before anything is spawned; every rank checks again
        await asyncio.to_thread(check_headers, model_dir, family, spec)
    if config.model.checksums is not None:
        await asyncio.to_thread(verify_checksums, model_dir, config.model.checksums)
    # a layout the model cannot have is refused before anything is spawned
    shard_model(spec, config.parallel, config.model.quantization)
    match choose_launcher(config, os.environ):
        case "inprocess":
            from shoal.launcher.inprocess import start_inprocess

            check_idle(resolved, CONTROLLER, NO_CONTROLLER, refuse=False)  # the layout is a matter of one flag
            return await start_inprocess(config, spec, model_dir)
        case "local":
            from shoal.launcher.local_start import start_local

            return await start_local(config, spec, model_dir, on_progress)
        case "torchrun":
            from shoal.launcher.torchrun_start import start_torchrun

            return await start_torchrun(config, spec, model_dir, on_progress)
        case "ray":
            from shoal.launcher.ray_start import start_ray

            return await start_ray(config, spec, model_dir, on_progress)
