"""Resolving "auto": what is chosen for which host, and what is refused with the number and the fix."""

from typing import Any

import msgspec
import pytest

from shoal.configs.schema import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, ShoalConfig
from shoal.launcher.local_start import device_of
from shoal.launcher.ray_cluster import Node
from shoal.launcher.ray_fleet import _choose_device
from shoal.launcher.settle import Host, for_place, settle
from tests.launcher.fake_worker import SPEC

CPU = Host(gpus=0, native=True, ranks=4)


def config(
    tensor: int = 1, data: int = 1, max_model_len: int | None = None, sharing: int = 1, **runtime: Any
) -> ShoalConfig:
    """Unresolved settings."""
    return ShoalConfig(
        model=ModelConfig(max_model_len=max_model_len),
        parallel=ParallelConfig(tensor=tensor, data=data, ranks_per_device=sharing),
        runtime=RuntimeConfig(**runtime),
    )


def test_nothing_automatic_is_left_and_the_choice_is_told() -> None:
    settled = settle(config(4), SPEC, CPU)
    model, runtime = settled.config.model, settled.config.runtime
    assert (model.dtype, model.max_model_len) == ("float32", 512)
    assert (runtime.device, runtime.collectives, runtime.native) == ("cpu", "shm", "require")
    assert runtime.threads is not None and runtime.threads >= 1
    assert runtime.seed is not None
    assert settled.ranks_per_device == 4
    assert settled.notes[0].startswith("tensor 4 x pipeline 1 x data 1 = 4 ranks on cpu: float32, context 512, shm")


def test_quantised_weights_are_told() -> None:
    quantised = ShoalConfig(model=ModelConfig(quantization="int4"))
    assert "float32 with int4 weights, context" in settle(quantised, SPEC, CPU).notes[0]
    small_cache = ShoalConfig(cache=CacheConfig(dtype="fp8"))
    assert "float32, fp8 KV cache, context" in settle(small_cache, SPEC, CPU).notes[0]
    on_gpu = settle(quantised, SPEC, Host(gpus=1, native=False, ranks=1)).notes[0]
    assert "1 rank on cuda: float32 with int4 weights" in on_gpu


def test_what_was_set_stays() -> None:
    settled = settle(config(2, max_model_len=100, threads=3, seed=5, collectives="gloo", native="off"), SPEC, CPU)
    assert settled.config.model.max_model_len == 100
    assert (settled.config.runtime.threads, settled.config.runtime.seed) == (3, 5)
    assert settled.config.runtime.collectives == "gloo"


@pytest.mark.parametrize(
    ("asked", "threads", "host", "expected"),
    [
        (None, None, Host(gpus=0, native=True, ranks=4, cores=(8, 4)), (1, 4)),  # in turn: a pair with all eight
        (2, None, Host(gpus=0, native=True, ranks=4, cores=(8, 4)), (2, 2)),
        (None, 3, Host(gpus=0, native=True, ranks=4, cores=(8, 4)), (2, 3)),  # of so many threads, all are used
        (1, 3, Host(gpus=0, native=True, ranks=4, cores=(8, 4)), (1, 3)),
        (None, None, Host(gpus=0, native=True, ranks=2, one_host=False, cores=(8, 2)), (2, 4)),
        (1, None, Host(gpus=0, native=True, ranks=2, one_host=False, cores=(8, 2)), (1, 4)),
        (None, None, Host(gpus=4, native=False, ranks=4, cores=(8, 4)), (2, 2)),
        (None, None, Host(gpus=0, native=True, ranks=4, cores=(1, 4)), (1, 1)),
        (None, None, Host(gpus=0, native=True, ranks=8, cores=(8, 8)), (1, 2)),  # two replicas
        (None, None, Host(gpus=0, native=True, ranks=4, cores=(8, 4), memory_nodes=2), (2, 2)),
    ],
)
def test_stages_of_one_hosts_cores_take_turns(
    asked: int | None, threads: int | None, host: Host, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.launcher.settle.memory_nodes", lambda: 1)
    given = ShoalConfig(
        parallel=ParallelConfig(tensor=2, pipeline=2, micro_batches=asked), runtime=RuntimeConfig(threads=threads)
    )
    settled = settle(given, SPEC, host)
    assert (settled.config.parallel.micro_batches, settled.config.runtime.threads) == expected
    assert ("stages take turns" if expected[0] == 1 else "2 steps in flight") in settled.notes[0]


def test_some_of_the_stages_work_at_once() -> None:
    given = ShoalConfig(parallel=ParallelConfig(pipeline=4, micro_batches=2))
    settled = settle(given, SPEC, Host(gpus=0, native=True, ranks=4, cores=(8, 4)))
    assert settled.config.runtime.threads == 4
    again = settle(settled.config, SPEC, CPU).config
    assert msgspec.structs.asdict(again) == msgspec.structs.asdict(settled.config)


def test_a_replica_on_other_hosts_has_the_settings_of_its_place() -> None:
    asked = ShoalConfig(parallel=ParallelConfig(pipeline=4))
    whole = Host(gpus=0, native=True, ranks=4, cores=(8, 4), memory_nodes=1)
    split = Host(gpus=0, native=True, ranks=2, one_host=False, cores=(8, 2), memory_nodes=1)
    for first, chosen in ((whole, (1, 8, "shm")), (split, (4, 4, "gloo"))):
        settled = settle(asked, SPEC, first).config
        assert for_place(settled, asked, first, "cpu") == settled
        assert (settled.parallel.micro_batches, settled.runtime.threads, settled.runtime.collectives) == chosen
    moved = for_place(settled, asked, whole, "cpu")
    assert (moved.parallel.micro_batches, moved.runtime.threads, moved.runtime.collectives) == (1, 8, "shm")


def test_stages_work_side_by_side_where_cores_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.launcher.settle.memory_nodes", lambda: 2)
    settled = settle(ShoalConfig(parallel=ParallelConfig(pipeline=4)), SPEC, CPU)
    assert settled.config.parallel.micro_batches == 4


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (Host(gpus=0, native=False, ranks=4), "gloo"),
        (Host(gpus=0, native=True, ranks=4, one_host=False), "gloo"),
        (Host(gpus=4, native=False, ranks=4), "nccl"),
    ],
    ids=["no C kernels", "several hosts", "GPUs"],
)
def test_collectives_follow_the_host(host: Host, expected: str) -> None:
    assert settle(config(4), SPEC, host).config.runtime.collectives == expected


def test_more_gpus_than_the_layout_uses_are_mentioned() -> None:
    settled = settle(config(), SPEC, Host(gpus=2, native=False, ranks=1))
    assert settled.config.runtime.device == "cuda"
    assert settled.ranks_per_device == 1
    assert settled.notes[1] == "2 GPUs seen, using 1: try -tp 2"
    assert len(settle(config(2), SPEC, Host(gpus=2, native=False, ranks=2)).notes) == 1
    of_two_hosts = Host(gpus=8, native=False, ranks=4, one_host=False)
    assert settle(config(8), SPEC, of_two_hosts).notes[1] == "8 GPUs seen, using 4"


def test_ranks_that_share_a_gpu_exchange_through_the_host_and_divide_its_memory() -> None:
    settled = settle(config(4, sharing=2), SPEC, Host(gpus=3, native=False, ranks=4))
    assert (settled.config.runtime.device, settled.config.runtime.collectives) == ("cuda", "gloo")
    assert settled.ranks_per_device == 2
    assert "gloo collectives through host memory, 2 ranks per GPU" in settled.notes[0]
    assert settled.notes[1] == "3 GPUs seen, using 2"
    assert [device_of(settled.config, rank) for rank in range(4)] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    own = settle(config(2, collectives="gloo"), SPEC, Host(gpus=2, native=False, ranks=2))
    assert own.config.runtime.collectives == "gloo" and own.ranks_per_device == 1


@pytest.mark.parametrize(
    ("settings", "host", "words"),
    [
        (
            config(4),
            Host(gpus=2, native=False, ranks=4),
            "needs 4 GPUs.*torch sees 2.*parallel.ranks_per_device = 2, or.*runtime.device = cpu",
        ),
        (config(device="cuda"), CPU, "runtime.device = cuda, but torch sees no GPU here"),
        (config(2, collectives="shm"), Host(gpus=0, native=False, ranks=2), "shm needs the C kernels.*gloo"),
        (config(2, collectives="shm"), Host(gpus=0, native=True, ranks=2, one_host=False), "on several; use gloo"),
        (config(2, collectives="nccl"), CPU, "nccl works on GPUs, and torch sees none"),
        (config(4, sharing=2), Host(gpus=1, native=False, ranks=4), "needs 2 GPUs.*parallel.ranks_per_device = 4"),
        (config(2, sharing=2), CPU, "how many ranks share a GPU, and the ranks run on the CPU.*leave it out"),
        (config(2, sharing=2, collectives="nccl"), Host(gpus=1, native=False, ranks=2), "nccl refuses two ranks"),
        (config(2, collectives="shm"), Host(gpus=2, native=True, ranks=2), "shm joins CPU tensors.*use auto or nccl"),
        (
            ShoalConfig(runtime=RuntimeConfig(enforce_eager=True)),
            CPU,
            "enforce_eager does without CUDA graphs.*leave it",
        ),
        (ShoalConfig(model=ModelConfig(quantization="fp8")), CPU, "quantization = fp8 is for GPUs.*use int8 or int4"),
        (config(max_model_len=513), CPU, "max_model_len = 513 exceeds the checkpoint's context of 512 tokens"),
    ],
)
def test_what_cannot_work_here_is_refused(settings: ShoalConfig, host: Host, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settle(settings, SPEC, host)


def test_more_ranks_than_shared_memory_joins_use_gloo_or_are_refused() -> None:
    host = Host(gpus=0, native=True, ranks=65)
    assert settle(config(65), SPEC, host).config.runtime.collectives == "gloo"
    with pytest.raises(ValueError, match="at most 64 ranks, not 65"):
        settle(config(65, collectives="shm"), SPEC, host)


def test_settling_twice_changes_nothing() -> None:
    once = settle(config(2), SPEC, CPU).config
    assert msgspec.structs.asdict(settle(once, SPEC, CPU).config) == msgspec.structs.asdict(once)


def test_ranks_per_device_is_refused_where_ray_gives_out_the_gpus() -> None:
    node = Node("id", "address", {"CPU": 8, "GPU": 2}, {})
    assert _choose_device(config(2), [node]) == "cuda"
    with pytest.raises(ValueError, match="Ray gives every rank a GPU of its own"):
        _choose_device(config(2, sharing=2), [node])
