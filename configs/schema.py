"""The one declaration of every setting: YAML keys, flags, Python keywords, documentation and `explain` come from it.

A field's flag and keyword default to its own name; `extra` in its Meta overrides them where vLLM users know another
spelling. Constructors do not validate: `shoal.configs.loader` does, and reports every error at once.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, unknown keys refused."""


def _names(*flags: str, keyword: str | None = None, size: bool = False) -> dict[str, Any]:
    """The `extra` of a field: its flags, its Python keyword, and whether it is a size in bytes that accepts `4GiB`."""
    extra: dict[str, Any] = {}
    if flags:
        extra["flags"] = list(flags)
    if keyword:
        extra["keyword"] = keyword
    if size:
        extra["size"] = True
    return extra


Text = Annotated[str, Meta(min_length=1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
RankCount = Annotated[int, Meta(ge=1, le=4096)]
Bytes = Annotated[int, Meta(ge=1, le=2**62)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(gt=0.0, le=1e6)]
Share = Annotated[float, Meta(gt=0.0, le=1.0)]
Weight = Annotated[float, Meta(gt=0.0)]


class ModelConfig(Section, frozen=True, kw_only=True):
    """Which checkpoint, and how it is read."""

    path: Annotated[
        Text | None,
        Meta(
            description="A local folder, a Hugging Face hub id, or `demo`.",
            extra=_names("--model", keyword="model"),
        ),
    ] = None
    revision: Annotated[Text | None, Meta(description="Branch, tag or commit of the hub repository.")] = None
    tokenizer: Annotated[Text | None, Meta(description="Folder of another tokenizer; default: the model's own.")] = None
    skip_tokenizer_init: Annotated[bool, Meta(description="Work with token ids only.")] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="Type of weights and activations; auto takes the checkpoint's."),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4", "fp8"],
        Meta(
            description="Weights of linears in 8 or 4 bits, made when a float checkpoint is loaded. On CPUs "
            "activations are rounded to 8 bits in the products; fp8, on GPUs only, rounds them to FP8. See "
            "docs/quantisation.md."
        ),
    ] = "none"
    max_model_len: Annotated[
        Positive | None,
        Meta(description="Longest prompt plus output, in tokens; default: the checkpoint's limit."),
    ] = None
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"],
        Meta(description="dummy makes random weights in place and reads no file."),
    ] = "auto"
    checksums: Annotated[
        Text | None,
        Meta(description="A manifest of SHA-256 sums (sha256sum format) every weight file is checked against."),
    ] = None
    served_model_name: Annotated[
        Text | None,
        Meta(description="Name the model is served under; default: its path."),
    ] = None


class ParallelConfig(Section, frozen=True, kw_only=True):
    """The layout: tensor x pipeline x data."""

    tensor: Annotated[
        RankCount,
        Meta(
            description="Ranks that share every layer.",
            extra=_names("--tensor-parallel-size", "-tp", keyword="tensor_parallel_size"),
        ),
    ] = 1
    pipeline: Annotated[
        RankCount,
        Meta(
            description="Stages the layers are divided into.",
            extra=_names("--pipeline-parallel-size", "-pp", keyword="pipeline_parallel_size"),
        ),
    ] = 1
    data: Annotated[
        RankCount,
        Meta(
            description="Replicas of the whole model.",
            extra=_names("--data-parallel-size", "-dp", keyword="data_parallel_size"),
        ),
    ] = 1
    tensor_weights: Annotated[
        list[Weight] | None,
        Meta(description="Share of each tensor rank, for unequal devices, such as [2, 1, 1]; default: equal."),
    ] = None
    pipeline_layers: Annotated[
        list[Positive] | None,
        Meta(description="Layers of each stage, such as [10, 12]; default: balanced by predicted cost."),
    ] = None
    micro_batches: Annotated[
        RankCount | None,
        Meta(
            description="Steps under way at once, among which running requests are divided; at most one per stage. "
            "Default: one per stage, so that all work side by side; but 1 where the stages share the cores of one host "
            "whose memory is one (no NUMA nodes), and runtime.threads is left out: they take turns, each with the "
            "threads of all."
        ),
    ] = None
    ranks_per_device: Annotated[
        RankCount,
        Meta(
            description="Ranks of a host that share a GPU, for trying layouts on few cards: they exchange tensors "
            "through host memory, and divide the card's memory."
        ),
    ] = 1
    expert: Annotated[
        bool,
        Meta(
            description="Give each tensor rank whole experts instead of a slice of each.",
            extra=_names("--enable-expert-parallel", keyword="enable_expert_parallel"),
        ),
    ] = False


class CacheConfig(Section, frozen=True, kw_only=True):
    """The paged KV cache."""

    block_size: Annotated[int, Meta(ge=1, le=256, description="Tokens per block.")] = 16
    dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(
            description="Type of cached keys and values: auto is the model's; fp8 (e4m3, one byte) takes the "
            "checkpoint's k_scale and v_scale, else 1. On CPUs torch computes with fp8, slower than the C kernels.",
            extra=_names("--kv-cache-dtype", keyword="kv_cache_dtype"),
        ),
    ] = "auto"
    num_blocks: Annotated[
        Positive | None,
        Meta(description="Blocks of the cache (of each group); default: as many as memory allows."),
    ] = None
    memory: Annotated[
        Bytes | None,
        Meta(
            description="Bytes of KV cache per rank, such as 4GiB; default: what gpu_memory_utilization leaves.",
            extra=_names("--kv-cache-memory-bytes", keyword="kv_cache_memory_bytes", size=True),
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        Share | None,
        Meta(
            description="Part of the device's memory Shoal may use; on a CPU, of the available memory, shared by the "
            "local ranks. Default: 0.9 on a GPU, 0.5 on a CPU.",
        ),
    ] = None
    reserve: Annotated[
        int,
        Meta(
            ge=0,
            le=2**62,
            description="Bytes per rank left alone beyond the measured peak.",
            extra=_names("--memory-reserve", keyword="memory_reserve", size=True),
        ),
    ] = 64 << 20
    enable_prefix_caching: Annotated[
        bool,
        Meta(description="Share the blocks of equal prefixes between requests."),
    ] = True


class SchedulerConfig(Section, frozen=True, kw_only=True):
    """What one step may hold."""

    max_num_seqs: Annotated[Positive, Meta(description="Most requests running at once, per replica.")] = 256
    max_num_batched_tokens: Annotated[Positive, Meta(description="Most tokens in one step.")] = 2048
    prefill_share: Annotated[
        Share,
        Meta(description="Most of a step's token budget that prefill may take while others decode."),
    ] = 1.0
    inter_token_limit_s: Annotated[
        Seconds | None,
        Meta(description="Prefill is cut so that a step's predicted time stays under this many seconds."),
    ] = None
    max_queued_requests: Annotated[
        Positive,
        Meta(description="Requests waiting per replica before new ones are refused."),
    ] = 8192
    max_queue_wait_s: Annotated[
        Seconds | None,
        Meta(description="New requests are refused while one is expected to wait longer than this for its first step."),
    ] = None


class LauncherConfig(Section, frozen=True, kw_only=True):
    """How processes are started, and how long anything may take."""

    kind: Annotated[
        Literal["auto", "inprocess", "local", "torchrun", "ray"],
        Meta(
            description="Who starts the ranks; auto: ray when launcher.address names a cluster, torchrun when its "
            "variables are set, else in-process for one rank, else local.",
            extra=_names("--launcher", keyword="launcher"),
        ),
    ] = "auto"
    address: Annotated[
        Text,
        Meta(
            description="The Ray cluster: host:port of its head, local for one of this process's own, auto for "
            "RAY_ADDRESS or the one on this machine, else as local.",
            extra=_names("--ray-address", keyword="ray_address"),
        ),
    ] = "auto"
    ray_auth: Annotated[
        Literal["auto", "token", "off"],
        Meta(description="Ray's token authentication; auto keeps RAY_AUTH_MODE where it is set, else token."),
    ] = "auto"
    attach: Annotated[
        Text | None,
        Meta(description="Start nothing: send the requests to the detached model of this name (`shoal up --name`)."),
    ] = None
    start_timeout_s: Annotated[Seconds, Meta(description="Seconds until every rank must be ready.")] = 600.0
    step_timeout_s: Annotated[
        Seconds,
        Meta(description="Seconds one step, or one collective in it, may take."),
    ] = 120.0
    hang_timeout_s: Annotated[
        float,
        Meta(
            ge=1.5,
            le=1e6,
            description="Seconds within which a hang is noticed: a rank or engine without a sign of life, which comes "
            "once a second, or a step without progress, for up to 2 s less.",
        ),
    ] = 10.0
    stop_timeout_s: Annotated[Seconds, Meta(description="Seconds ranks get to end before they are killed.")] = 2.0
    controller_grace_s: Annotated[
        Seconds,
        Meta(description="Seconds the ranks of a detached model (`shoal up`) wait for its controller to come back."),
    ] = 60.0
    lease_s: Annotated[
        float,
        Meta(
            ge=0.2,
            le=1e6,
            description="Seconds without a sign of life, which comes five times as often, after which a front end of a "
            "detached model (`shoal up`) loses what it asked for; one that comes back goes on.",
        ),
    ] = 0.75
    routing: Annotated[
        Literal["prefix", "least_loaded", "round_robin"],
        Meta(
            description="Which replica a request goes to: where most of its prompt is cached, the fewest outstanding "
            "tokens, or one after the other."
        ),
    ] = "prefix"
    load_factor: Annotated[
        float,
        Meta(
            ge=1.0,
            le=1e6,
            description="With routing = prefix: most outstanding tokens a replica may have beside those of the least "
            "loaded, as a multiple, to be chosen for what it has cached.",
        ),
    ] = 2.0
    drain_timeout_s: Annotated[
        Seconds,
        Meta(description="Seconds what runs gets to finish when a replica is taken away or a command is told to end."),
    ] = 30.0
    max_restarts: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="Lives of a replica in a row that may come to nothing before it is given up; 0: none is built "
            "again.",
        ),
    ] = 5


class RuntimeConfig(Section, frozen=True, kw_only=True):
    """Devices, kernels and numerics."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="auto takes the GPUs when torch sees any."),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(description="One reduction order per row whatever the batch, chunk, cache hit or restart."),
    ] = False
    seed: Annotated[
        Seed | None,
        Meta(
            description="Seed of the seeds drawn for requests without one, and of dummy weights; makes a whole run "
            "reproducible. Default: from the system."
        ),
    ] = None
    threads: Annotated[
        Positive | None,
        Meta(description="CPU threads per rank; default: the host's cores divided by its ranks that work at once."),
    ] = None
    pin_cores: Annotated[
        bool,
        Meta(
            description="Keep every CPU rank of a tensor group to cores of its own; those of a pipeline's stages share "
            "them when they take turns. Only where all ranks are local processes and the host has a core for each of "
            "their threads, and not with several steps in flight but fewer than stages."
        ),
    ] = True
    collectives: Annotated[
        Literal["auto", "shm", "gloo", "nccl"],
        Meta(
            description="auto: NCCL on GPUs (gloo, through host memory, where ranks share one); on CPUs shared memory "
            "on one host when the C kernels are there, else gloo."
        ),
    ] = "auto"
    native: Annotated[
        Literal["auto", "require", "off"],
        Meta(
            description="The C kernels on CPUs: auto warns and uses torch without a compiler, require refuses to start."
        ),
    ] = "auto"
    enforce_eager: Annotated[
        bool,
        Meta(
            description="On GPUs, launch every step kernel by kernel: no CUDA graphs, which save most of the host's "
            "time and take some memory, and no step planned while another runs."
        ),
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="What ranks report; debug also prints the traceback of a failure."),
    ] = "info"


class ShoalConfig(Section, frozen=True, kw_only=True):
    """All settings. Frozen; made by `shoal.configs.loader.load_config`, which alone validates."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    launcher: LauncherConfig = LauncherConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    sampling: Annotated[
        dict[str, Any],
        Meta(
            description="Defaults of SamplingParams for requests that give none; overrides the checkpoint's "
            "generation_config."
        ),
    ] = msgspec.field(default_factory=dict)

    @property
    def ranks_per_replica(self) -> int:
        """Tensor times pipeline size."""
        return self.parallel.tensor * self.parallel.pipeline

    @property
    def world_size(self) -> int:
        """Ranks of all replicas."""
        return self.ranks_per_replica * self.parallel.data
