"""Quantised parameters: which they are, that every layout and storage gives the same ones, and what they take."""

from functools import cache
from pathlib import Path

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.kernels import device
from shoal.kernels.build import native_library
from shoal.kernels.fp8_weight import Fp8ChannelWeight
from shoal.kernels.quantized_format import quantized_bytes
from shoal.kernels.quantized_weight import QuantizedWeight
from shoal.kernels.span_weight import SpanWeight, unpack_spans
from shoal.kernels.weight import RoundedWeight
from shoal.model.checkpoint import Checkpoint, CheckpointError, load_parameters
from shoal.model.decoder import Stage
from shoal.model.dummy import dummy_parameters
from shoal.model.families import load_spec
from shoal.model.families.names import logical_shapes
from shoal.model.memory_estimate import weights_bytes
from shoal.model.parameters import head_is_shared, local_parameters
from shoal.model.prepare import num_bytes, prepare_weights
from shoal.model.shard import ModelShard, Quantization, shard_model
from shoal.model.spec import DecoderSpec
from shoal.parallel.communicator import SingleCommunicator
from shoal.parallel.mesh import make_mesh
from tests.model.paged import PagedModel
from tests.model.raw_safetensors import read_header, write
from tests.model.specs import SPECS, VOCAB
from tests.model.tiny_models import make_model
from tests.ranks import Ranks, run_ranks

CPU = torch.device("cpu")
BOTH: tuple[Quantization, ...] = ("int8", "int4")
LAYOUTS = [
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(tensor=3),
    ParallelConfig(tensor=4, tensor_weights=[2, 1, 1, 1]),
]
FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "olmo2", "mixtral", "qwen2_moe"]
PROMPT = [index * 17 % VOCAB for index in range(24)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def floats(value: torch.Tensor | RoundedWeight) -> torch.Tensor:
    if isinstance(value, Fp8ChannelWeight):
        return value.codes.float() * value.scales
    return value.dequantize() if isinstance(value, QuantizedWeight) else value


@cache
def quantized(folder: Path, shard: ModelShard) -> dict[str, torch.Tensor | QuantizedWeight]:
    spec, family = load_spec(folder)
    with Checkpoint(folder) as checkpoint:
        return load_parameters(checkpoint, family, spec, shard, torch.float32, CPU)


def gather(folder: Path, parallel: ParallelConfig, quantization: Quantization) -> dict[str, torch.Tensor]:
    """What every logical parameter stands for, put together from the ranks, who must agree where they overlap."""
    spec, _ = load_spec(folder)
    found: dict[str, torch.Tensor] = {}
    for shard in shard_model(spec, parallel, quantization):
        tensors = quantized(folder, shard)
        for parameter in local_parameters(spec, shard):
            value = floats(tensors[parameter.name])
            for part in parameter.parts:
                logical = found.setdefault(part.logical, torch.full(logical_shapes(spec)[part.logical], torch.nan))
                view = logical[tuple(slice(*bounds) for bounds in part.source)]
                values = value[tuple(slice(*bounds) for bounds in part.dest)].reshape(view.shape)
                assert torch.equal(view[~view.isnan()], values[~view.isnan()])
                view.copy_(values)
    return found


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_holds_slices_of_one_quantised_model(name: str, quantization: Quantization, root: Path) -> None:
    folder = make_model(name, root)
    one = gather(folder, ParallelConfig(), quantization)
    moe = [ParallelConfig(tensor=2, expert=True)] if "m" in name and ("mix" in name or "moe" in name) else []
    for parallel in LAYOUTS + moe:
        many = gather(folder, parallel, quantization)
        assert one.keys() == many.keys()
        differing = [key for key, value in one.items() if not torch.equal(many[key], value)]
        assert not differing, (parallel, differing)


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_are_quantised_and_nothing_else(name: str, root: Path) -> None:
    folder = make_model(name, root)
    spec, _ = load_spec(folder)
    [shard], [plain] = shard_model(spec, ParallelConfig(), "int4"), shard_model(spec, ParallelConfig())
    exact = quantized(folder, plain)
    for key, value in quantized(folder, shard).items():
        module, want = key.rpartition(".")[0], exact[key]
        if not isinstance(value, QuantizedWeight):
            assert torch.equal(value, want)
            assert value.dim() == 1 or module.endswith(("embed", "positions", "router", "shared_gate"))
            assert module != "embed" or not spec.tie_embeddings
            continue
        assert value.bits == (8 if module in ("head", "embed") else 4)
        assert (floats(value) - want).norm() / want.norm() < (0.01 if value.bits == 8 else 0.1)


@pytest.mark.parametrize("quantization", ["none", *BOTH])
@pytest.mark.parametrize("name", list(SPECS))
def test_the_ledger_counts_the_bytes_that_are_allocated(name: str, quantization: Quantization) -> None:
    spec = SPECS[name]()
    for parallel in (ParallelConfig(), ParallelConfig(tensor=3), ParallelConfig(tensor=2, pipeline=2)):
        for shard in shard_model(spec, parallel, quantization):
            params = dummy_parameters(spec, shard, torch.bfloat16, CPU, seed=1)
            total = sum(value.nbytes for value in params.values())
            assert weights_bytes(spec, shard, 2) == total
            if quantization != "none":
                params = {key: value for key, value in params.items() if isinstance(value, QuantizedWeight)}
                total = sum(map(num_bytes, params.values()))
                prepared = prepare_weights(params, native_library(), head_is_shared=head_is_shared(spec, shard))
                assert total == sum(map(num_bytes, prepared.values()))


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "qwen2_moe"])
def test_gpus_hold_the_same_codes_in_span_order(
    name: str, quantization: Quantization, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(name, root)
    spec, family = load_spec(folder)
    for shard in shard_model(spec, ParallelConfig(tensor=3), quantization):
        blocked = quantized(folder, shard)
        with monkeypatch.context() as patch, Checkpoint(folder) as checkpoint:
            patch.setattr(device, "INTERPRET_CPU_TENSORS", True)
            spans = load_parameters(checkpoint, family, spec, shard, torch.float32, CPU)
        spans = prepare_weights(spans, None, head_is_shared=head_is_shared(spec, shard))
        for key, value in blocked.items():
            if isinstance(value, QuantizedWeight):
                found, codes, scales = spans[key], value.int_codes(), value.plain_scales()
                assert isinstance(found, SpanWeight) and found.shape == value.shape
                assert torch.equal(unpack_spans(found.codes, found.bits)[..., : codes.shape[-1]], codes)
                assert torch.equal(found.scales[..., : scales.shape[-1]], scales)
        assert weights_bytes(spec, shard, 4, "cuda") == sum(map(num_bytes, spans.values()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_fp8_rounds_the_layers_linears_alike_on_every_layout(name: str, root: Path) -> None:
    folder = make_model(name, root)
    spec, _ = load_spec(folder)
    [plain] = shard_model(spec, ParallelConfig())
    exact = quantized(folder, plain)
    one = gather(folder, ParallelConfig(), "fp8")
    many = gather(folder, ParallelConfig(tensor=3), "fp8")
    assert not [key for key, value in one.items() if not torch.equal(many[key], value)]
    for shard in shard_model(spec, ParallelConfig(tensor=3), "fp8"):
        tensors = quantized(folder, shard)
        assert weights_bytes(spec, shard, 4, "cuda") == sum(value.nbytes for value in tensors.values())
    [whole] = shard_model(spec, ParallelConfig(), "fp8")
    for key, value in quantized(folder, whole).items():
        if isinstance(value, Fp8ChannelWeight):
            assert (floats(value) - exact[key]).norm() / exact[key].norm() < 0.04
        else:
            module = key.rpartition(".")[0]
            assert torch.equal(value, exact[key])
            assert value.dim() == 1 or module.endswith(("embed", "head", "positions", "router", "shared_gate"))


def test_half_the_bytes_and_a_quarter() -> None:
    assert quantized_bytes(1024, 4096, 0, 8) == 1024 * 4096 * 17 // 16
    assert quantized_bytes(1024, 4096, 0, 4) == 1024 * 4096 * 9 // 16


def test_slabs_do_not_show(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "mixtral"):
        folder = make_model(name, root)
        spec, family = load_spec(folder)
        for shard in shard_model(spec, ParallelConfig(tensor=3), "int8"):
            whole = quantized(folder, shard)
            with monkeypatch.context() as patch, Checkpoint(folder) as checkpoint:
                patch.setattr("shoal.model.quantize.SLAB_ELEMENTS", 900)
                pieces = load_parameters(checkpoint, family, spec, shard, torch.float32, CPU)
            assert all(torch.equal(floats(value), floats(pieces[key])) for key, value in whole.items())


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_checkpoints_are_quantised_too(stored: str, root: Path) -> None:
    folder = make_model("llama", root, dtype=stored)
    [shard], [plain] = (shard_model(load_spec(folder)[0], ParallelConfig(), kind) for kind in ("int8", "none"))
    exact = quantized(folder, plain)
    for key, value in quantized(folder, shard).items():
        if isinstance(value, QuantizedWeight):
            again = QuantizedWeight(tuple(value.shape), value.bits)
            again.put(0, exact[key])
            assert torch.equal(value.codes, again.codes) and torch.equal(value.scales, again.scales)


def test_progress_counts_every_byte_and_values_that_are_not_finite_are_named(root: Path, tmp_path: Path) -> None:
    folder, seen = make_model("llama", root), []
    spec, family = load_spec(folder)
    [shard] = shard_model(spec, ParallelConfig(), "int8")
    with Checkpoint(folder) as checkpoint:
        load_parameters(checkpoint, family, spec, shard, torch.float32, CPU, lambda *now: seen.append(now))
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(file.stat().st_size for file in folder.glob("*.safetensors")) - 8 - len(read_raw(folder)[0])
    )
    header, data = read_header(folder / "model.safetensors")
    begin = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    damaged = data[:begin] + b"\xff\xff\xff\xff" + data[begin + 4 :]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write(tmp_path / "model.safetensors", header, damaged)
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight.*not finite"),
    ):
        load_parameters(checkpoint, family, spec, shard, torch.float32, CPU)


def read_raw(folder: Path) -> tuple[bytes, bytes]:
    """Header and data of a file as bytes."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + size], raw[8 + size :]


def logits(spec: DecoderSpec, shard: ModelShard, group: object, chunks: list[int]) -> torch.Tensor:
    """The logits of PROMPT, computed in chunks beside another request."""
    params = dummy_parameters(spec, shard, torch.float32, CPU, seed=1)
    params = prepare_weights(params, native_library(), head_is_shared=head_is_shared(spec, shard))
    model = PagedModel(spec, [Stage(spec, shard, params, group, deterministic=True)], block_size=4)  # type: ignore[arg-type]
    model.add("a", PROMPT)
    model.add("b", PROMPT[::-1])
    return torch.cat([model.step([("b", 1), ("a", count)])["a"] for count in chunks])


def on_ranks(ranks: Ranks, name: str, quantization: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
    """logits() on a tensor group, the prompt cut in two ways."""
    spec = SPECS[name]()
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 30.0, True)
    try:
        shard = shard_model(spec, ParallelConfig(tensor=ranks.world_size), quantization)[ranks.rank]
        first, second = (logits(spec, shard, mesh.tensor, chunks) for chunks in ([24], [9, 1, 1, 13]))
        return first, second
    finally:
        mesh.close()


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize(("name", "world_size"), [("heads-6-2", 2), ("learned", 3), ("gemma", 2), ("moe-shared", 3)])
def test_tensor_ranks_compute_what_one_computes(name: str, world_size: int, quantization: Quantization) -> None:
    """Within the rounding of activations: these sizes cut groups between ranks. Chunks change no bit."""
    spec = SPECS[name]()
    [alone] = shard_model(spec, ParallelConfig(), quantization)
    want = logits(spec, alone, SingleCommunicator("tensor"), [24])
    for first, second in run_ranks(world_size, on_ranks, name, quantization):
        assert torch.equal(first, second)
        assert (first - want).norm() / want.norm() < 0.03


def through_triton(ranks: Ranks, name: str, quantization: Quantization) -> torch.Tensor:
    """logits() of a tensor group as GPUs compute them, in Triton's interpreter on every rank."""
    spec = SPECS[name]()
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 60.0, True)
    device.INTERPRET_CPU_TENSORS = True
    try:
        shard = shard_model(spec, ParallelConfig(tensor=ranks.world_size), quantization)[ranks.rank]
        params = dummy_parameters(spec, shard, torch.float32, CPU, seed=1)
        params = prepare_weights(params, None, head_is_shared=head_is_shared(spec, shard))
        model = PagedModel(spec, [Stage(spec, shard, params, mesh.tensor, deterministic=True)], block_size=4)
        model.add("a", PROMPT[:6])
        return model.step([("a", 6)])["a"]
    finally:
        device.INTERPRET_CPU_TENSORS = False
        mesh.close()


@pytest.mark.parametrize(
    ("name", "world_size", "quantization", "limit"),
    [("heads-6-2", 2, "int4", 1e-5), ("moe-shared", 2, "int8", 1e-5), ("heads-6-2", 2, "fp8", 0.12)],
)
def test_on_gpus_tensor_ranks_compute_what_one_computes(
    name: str, world_size: int, quantization: Quantization, limit: float
) -> None:
    """Activations are not rounded there, so layouts differ by the order of sums alone; but for FP8, as each rank rounds
    its part of a row by a maximum of its own.
    """
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    [want] = run_ranks(1, through_triton, name, quantization)
    for found in run_ranks(world_size, through_triton, name, quantization):
        assert (found - want).norm() / want.norm() < limit
