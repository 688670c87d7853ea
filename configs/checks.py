"""What must hold between settings: contradictions, and settings that could not take effect, are refused here.

What depends on the model or on the devices found (heads per rank, memory, GPUs) is checked where that is known.
"""

from collections.abc import Callable, Iterator, Mapping

from shoal.configs.problems import Problem
from shoal.configs.schema import ShoalConfig

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MARKER = "TORCHELASTIC_RUN_ID"
"""Set by torchrun itself: MASTER_ADDR, RANK and WORLD_SIZE alone may stem from another launcher (Slurm, MPI)."""


def is_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether this process was started by torchrun."""
    return _MARKER in environ and all(name in environ for name in TORCHRUN_VARIABLES)


def check_together(
    config: ShoalConfig, given: set[str], wrong: set[str], environ: Mapping[str, str]
) -> Iterator[Problem]:
    """Every contradiction between settings that are legal each on its own.

    given: keys somebody set, as opposed to defaults. wrong: keys already refused, whose values in `config` are the
    defaults; checks that read them are left out. environ: the process environment, for torchrun's variables.
    """
    for check, keys in _CHECKS:
        if wrong.isdisjoint(keys):
            yield from check(config, given)
    if wrong.isdisjoint(_LAYOUT_KEYS):
        yield from _launcher(config, given, environ)


def _model(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    model = config.model
    if model.checksums is not None and model.load_format == "dummy":
        yield Problem(
            key="model.checksums",
            value=model.checksums,
            message="cannot be checked with model.load_format = dummy, which reads no file; leave one of them out",
        )
    if model.quantization == "fp8" and config.runtime.device == "cpu":
        yield Problem(
            key="model.quantization",
            value=model.quantization,
            message="is for GPUs, and runtime.device is cpu; use int8 or int4, or leave it out",
        )
    if model.tokenizer is not None and model.skip_tokenizer_init:
        yield Problem(
            key="model.tokenizer",
            value=model.tokenizer,
            message="would not be used with model.skip_tokenizer_init = true; leave one of them out",
        )
    if model.revision is not None and model.path == "demo":
        yield Problem(
            key="model.revision",
            value=model.revision,
            message="only hub repositories have revisions, and model.path is demo; leave it out",
        )


def _layout(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    parallel = config.parallel
    weights, layers = parallel.tensor_weights, parallel.pipeline_layers
    if weights is not None and len(weights) != parallel.tensor:
        yield Problem(
            key="parallel.tensor_weights",
            value=_listed(weights),
            message=f"must have one weight per tensor rank: {len(weights)} weights, but parallel.tensor is "
            f"{parallel.tensor} (-tp {len(weights)} would fit)",
        )
    if layers is not None and len(layers) != parallel.pipeline:
        yield Problem(
            key="parallel.pipeline_layers",
            value=_listed(layers),
            message=f"must have one number per stage: {len(layers)} numbers, but parallel.pipeline is "
            f"{parallel.pipeline} (-pp {len(layers)} would fit)",
        )
    if parallel.micro_batches is not None and parallel.micro_batches > parallel.pipeline:
        yield Problem(
            key="parallel.micro_batches",
            value=str(parallel.micro_batches),
            message=f"must be at most parallel.pipeline, which is {parallel.pipeline}: a stage computes one step at a "
            "time; lower it or leave it out",
        )


def _cache(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    cache, max_model_len = config.cache, config.model.max_model_len
    if cache.num_blocks is not None and cache.memory is not None:
        yield Problem(
            key="cache.memory",
            value=str(cache.memory),
            message=f"would not be used: cache.num_blocks = {cache.num_blocks} fixes the size; leave one of them out",
        )
    if cache.num_blocks is not None and max_model_len is not None:
        needed = -(-max_model_len // cache.block_size)
        if cache.num_blocks < needed:
            yield Problem(
                key="cache.num_blocks",
                value=str(cache.num_blocks),
                message=f"{cache.num_blocks} blocks of {cache.block_size} tokens cannot hold one request of "
                f"model.max_model_len = {max_model_len}; at least {needed} blocks, or max_model_len at most "
                f"{cache.num_blocks * cache.block_size}",
            )


def _scheduler(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    seqs, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    if "scheduler.max_num_seqs" in given and seqs > tokens:
        yield Problem(
            key="scheduler.max_num_seqs",
            value=str(seqs),
            message=f"must be at most scheduler.max_num_batched_tokens = {tokens}: each running request needs a token "
            "of the step's budget",
        )


def _runtime(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    runtime = config.runtime
    if runtime.collectives == "shm" and runtime.device == "cuda":
        yield _collectives("shm", "work on CPU tensors only, and runtime.device is cuda; use auto, nccl or gloo")
    if runtime.collectives == "nccl" and runtime.device == "cpu":
        yield _collectives("nccl", "work on GPU tensors only, and runtime.device is cpu; use auto, shm or gloo")
    if runtime.collectives == "shm" and runtime.native == "off":
        yield _collectives("shm", "are C kernels, and runtime.native is off; use gloo, or native auto")
    if config.parallel.ranks_per_device > 1 and runtime.device == "cpu":
        yield Problem(
            key="parallel.ranks_per_device",
            value=str(config.parallel.ranks_per_device),
            message="says how many ranks share a GPU, and runtime.device is cpu, where all share the memory; "
            "leave it out",
        )
    elif config.parallel.ranks_per_device > config.world_size:
        yield Problem(
            key="parallel.ranks_per_device",
            value=str(config.parallel.ranks_per_device),
            message=f"the layout has {config.world_size} {'rank' if config.world_size == 1 else 'ranks'}; at most that",
        )
    if config.parallel.ranks_per_device > 1 and runtime.collectives == "nccl" and config.ranks_per_replica > 1:
        yield _collectives("nccl", "refuse two ranks on one GPU, and parallel.ranks_per_device is over 1; use auto")
    if runtime.native == "require" and runtime.device == "cuda":
        yield Problem(
            key="runtime.native",
            value="require",
            message="the C kernels run on CPUs, and runtime.device is cuda; use auto",
        )


_FIXED_AT_START = frozenset(
    [f"model.{name}" for name in ("dtype", "quantization", "max_model_len")]
    + [f"runtime.{name}" for name in ("device", "deterministic", "threads", "collectives", "native")]
    + [
        f"launcher.{name}"
        for name in ("step_timeout_s", "controller_grace_s", "lease_s", "max_restarts", "routing", "load_factor")
    ]
)
"""Beside the layout, cache and scheduler: what a detached model was started with, and a front end cannot change."""


def _ray(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    launcher = config.launcher
    elsewhere = launcher.kind == "auto" and launcher.address != "auto"
    uses_ray = launcher.kind == "ray" or launcher.attach is not None or elsewhere
    for name in ("address", "ray_auth"):
        if not uses_ray and f"launcher.{name}" in given:
            yield Problem(
                key=f"launcher.{name}",
                value=getattr(launcher, name),
                message=f"is about Ray clusters, and launcher.kind is {launcher.kind}; use ray, or leave it out",
            )
    if launcher.attach is not None:
        if launcher.kind not in ("auto", "ray"):
            yield Problem(
                key="launcher.kind",
                value=launcher.kind,
                message=f"would not be used: launcher.attach = {launcher.attach} starts nothing; leave one of them out",
            )
        for key in sorted(given):
            if key.startswith(("parallel.", "cache.", "scheduler.")) or key in _FIXED_AT_START:
                section, _, name = key.partition(".")
                value = getattr(getattr(config, section), name)
                message = (
                    f"would not be used: {launcher.attach} (launcher.attach) runs already with settings of its own"
                )
                yield Problem(key=key, value=str(value), message=message)
    host, _, port = launcher.address.rpartition(":")
    if launcher.address not in ("auto", "local") and not (host and port.isdigit()):
        yield Problem(
            key="launcher.address", value=launcher.address, message="must be auto, local, or host:port of a Ray head"
        )


def _collectives(kind: str, reason: str) -> Problem:
    return Problem(key="runtime.collectives", value=kind, message=f"these collectives {reason}")


def _launcher(config: ShoalConfig, given: set[str], environ: Mapping[str, str]) -> Iterator[Problem]:
    kind, world_size = config.launcher.kind, config.world_size
    layout = " x ".join(str(size) for size in (config.parallel.tensor, config.parallel.pipeline, config.parallel.data))
    if kind == "inprocess" and world_size != 1:
        yield Problem(
            key="launcher.kind",
            value=kind,
            message=f"one process runs one rank, and the layout {layout} (tensor x pipeline x data) has {world_size}; "
            "use auto or local",
        )
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    if kind == "torchrun" and missing:
        yield Problem(
            key="launcher.kind",
            value=kind,
            message=f"torchrun's variables {', '.join(missing)} are not set; start with "
            f"`torchrun --nproc-per-node {world_size} -m shoal ...`",
        )
    elif kind == "torchrun" or (kind == "auto" and is_torchrun(environ)):
        yield from _torchrun_size(environ["WORLD_SIZE"], world_size, layout)
        if "launcher.max_restarts" in given and config.launcher.max_restarts > 0:
            yield Problem(
                key="launcher.max_restarts",
                value=str(config.launcher.max_restarts),
                message="would not be used: the processes are torchrun's, which ends all with the first; leave it out, "
                "and give torchrun --max-restarts",
            )


def _torchrun_size(text: str, world_size: int, layout: str) -> Iterator[Problem]:
    if text != str(world_size):
        yield Problem(
            key="launcher.kind",
            value="torchrun",
            message=f"torchrun started {text} processes, but the layout {layout} (tensor x pipeline x data) has "
            f"{world_size} ranks; start as many with --nproc-per-node and --nnodes, or change the layout",
        )


def _listed(values: list[float] | list[int]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


_LAYOUT_KEYS = ("launcher.kind", "parallel.tensor", "parallel.pipeline", "parallel.data")
_Check = Callable[[ShoalConfig, set[str]], Iterator[Problem]]


def _routing(config: ShoalConfig, given: set[str]) -> Iterator[Problem]:
    launcher = config.launcher
    if "launcher.load_factor" in given and launcher.routing != "prefix":
        yield Problem(
            key="launcher.load_factor",
            value=str(launcher.load_factor),
            message=f"would not be used with launcher.routing = {launcher.routing}; leave one of them out",
        )
    if "launcher.routing" in given and launcher.routing == "prefix" and not config.cache.enable_prefix_caching:
        yield Problem(
            key="launcher.routing",
            value=launcher.routing,
            message="needs cache.enable_prefix_caching = true; take least_loaded",
        )


_CHECKS: tuple[tuple[_Check, tuple[str, ...]], ...] = (
    (
        _model,
        (
            "model.checksums",
            "model.load_format",
            "model.tokenizer",
            "model.revision",
            "model.path",
            "model.quantization",
            "runtime.device",
        ),
    ),
    (
        _layout,
        (
            "parallel.tensor",
            "parallel.pipeline",
            "parallel.tensor_weights",
            "parallel.pipeline_layers",
            "parallel.micro_batches",
        ),
    ),
    (_cache, ("cache.num_blocks", "cache.memory", "cache.block_size", "model.max_model_len")),
    (_scheduler, ("scheduler.max_num_seqs", "scheduler.max_num_batched_tokens")),
    (_routing, ("launcher.routing", "launcher.load_factor", "cache.enable_prefix_caching")),
    (_runtime, ("runtime.collectives", "runtime.device", "runtime.native", "parallel.ranks_per_device", *_LAYOUT_KEYS)),
    (_ray, ("launcher.kind", "launcher.address", "launcher.ray_auth", "launcher.attach")),
)
"""Each check with the keys it reads."""
