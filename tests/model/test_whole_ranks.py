"""Whole steps of tensor ranks, which add up and compare within C: the bits of the parts, on every rank; and what is
said when a rank does not come, means something else, or keeps the others waiting.
"""

import threading
import time

import msgspec
import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.kernels.build import load_native
from shoal.model.decoder import Stage
from shoal.model.dummy import dummy_parameters
from shoal.model.parameters import head_is_shared
from shoal.model.prepare import prepare_weights
from shoal.model.shard import shard_model
from shoal.model.spec import GatedFfn
from shoal.parallel.activity import Activity, watch_mesh
from shoal.parallel.communicator import CollectiveError
from shoal.parallel.mesh import Mesh, make_mesh
from tests.model.paged import PagedModel
from tests.model.specs import SPECS, VOCAB, moe, normed_residual, plain
from tests.ranks import Ranks, run_ranks

NATIVE = load_native("auto")
pytestmark = pytest.mark.skipif(NATIVE is None, reason="no C compiler")
SHARED = GatedFfn(intermediate_size=24, activation="silu")
MODELS = SPECS | {
    "normed": lambda: msgspec.structs.replace(normed_residual(), embed_size=None),
    "experts": lambda: plain(4, 2, ffn=moe(num_experts=9)),
    "experts-shared": lambda: plain(4, 2, ffn=moe(num_experts=9, shared=SHARED, shared_gate=True)),
}
PLANS = ([("a", 20), ("b", 3)], [("a", 1), ("b", 1)], [("b", 1), ("a", 4)], [("a", 1)])
STEPS_APART = {"normed-residual": "matrices around the layers: embeddings of another size than hidden states"}
FEW_EXPERTS = "a router of 7 rows, fewer than C packs; models have 8 experts and more"
LAYERS_APART = {"olmo": "norms of the heads of all ranks at once", "moe": FEW_EXPERTS, "moe-shared": FEW_EXPERTS}
ALL_BUT_ONE = ("a", 20)  # of the first plan's tokens: a row that samples nothing


def join(ranks: Ranks, tensor: int, pipeline: int = 1, timeout_s: float = 20.0) -> Mesh:
    native = load_native("require")
    return make_mesh("shm", ranks.rank, tensor, pipeline, ranks.rendezvous, timeout_s, native=native)


def make_stage(name: str, mesh: Mesh, dtype: torch.dtype, **options: object) -> Stage:
    """This rank's part of a model of random weights."""
    spec, parallel = MODELS[name](), ParallelConfig(tensor=mesh.tp_size, pipeline=mesh.pp_size, **options)  # type: ignore[arg-type]
    shard = shard_model(spec, parallel)[mesh.rank]
    weights = dummy_parameters(spec, shard, dtype, torch.device("cpu"), seed=1)
    weights = prepare_weights(weights, load_native("require"), head_is_shared=head_is_shared(spec, shard))
    return Stage(spec, shard, weights, mesh.tensor, deterministic=True)


def make_single(stage: Stage) -> Stage:
    """The same stage, single operations only."""
    for layer in stage.layers.values():
        layer.fused_mixer = layer.fused_ffn = None
    return stage


def make_model(stage: Stage) -> PagedModel:
    model = PagedModel(stage.spec, [stage], 4)
    for name, first, count in (("a", 3, 30), ("b", 7, 12)):
        model.add(name, [(first * position) % VOCAB for position in range(1, count)])
    return model


def advance(model: PagedModel, plan: list[tuple[str, int]]) -> None:
    for name, count in plan:
        model.sequences[name].num_computed += count


def apart(stage: Stage, model: PagedModel, plan: list[tuple[str, int]], rows: list[int], mesh: Mesh) -> torch.Tensor:
    """What single operations give: the hidden states, or this rank's shard of the logits."""
    batch = model.batch(plan)
    assert stage.whole(batch, model.caches[0]) is None
    if stage.shard.has_embedding:
        hidden = stage.embed(batch)
    else:
        hidden = mesh.pipeline.recv(torch.empty((batch.num_tokens, stage.spec.hidden_size), dtype=stage.dtype), 0)
    hidden = stage.forward(batch, hidden, model.caches[0])
    if not stage.shard.has_head:
        mesh.pipeline.send(hidden, 1)
        return hidden
    return stage.head_shard(hidden[rows])


def whole(stage: Stage, model: PagedModel, plan: list[tuple[str, int]], rows: list[int], mesh: Mesh) -> torch.Tensor:
    """The same at once; where there is a head, its best tokens and their logits are those of all ranks' logits."""
    batch = model.batch(plan)
    assert stage.whole(batch, model.caches[0]) is not None
    receive = None if stage.shard.has_embedding else (lambda hidden: mesh.pipeline.recv(hidden, 0))
    output, hidden = stage.step(batch, rows, model.caches[0], receive)
    if not stage.shard.has_head:
        mesh.pipeline.send(hidden, 1)
        return hidden
    logits = stage.gather_logits(output.head_RV.clone())
    assert output.best == logits.argmax(-1).tolist() and output.values == logits.amax(-1).tolist()
    return output.head_RV


def compare(ranks: Ranks, name: str, tensor: int, dtype: str, threads: int, options: dict[str, object]) -> bool:
    """Whether all of a few steps have equal bits both ways on this rank."""
    torch.set_num_threads(threads)
    mesh = join(ranks, tensor, ranks.world_size // tensor)
    try:
        stage, single = (make_stage(name, mesh, getattr(torch, dtype), **options) for _ in range(2))
        single, models, equal = make_single(single), [make_model(stage) for _ in range(2)], True
        for plan in PLANS:
            rows, stop = [], 0
            for row in plan:
                stop += row[1]
                rows += [] if row == ALL_BUT_ONE else [stop - 1]
            want = apart(single, models[0], plan, rows, mesh).clone()
            equal &= torch.equal(whole(stage, models[1], plan, rows, mesh), want)
            for model in models:
                advance(model, plan)
        return equal
    finally:
        mesh.close()


@pytest.mark.parametrize(
    ("name", "tensor", "world_size", "dtype", "threads", "options"),
    [
        ("heads-8-8", 2, 2, "float32", 1, {}),
        ("heads-6-2", 3, 3, "bfloat16", 1, {}),
        ("heads-5-1", 2, 2, "float32", 2, {}),
        ("heads-5-1", 3, 3, "bfloat16", 2, {"tensor_weights": [2.0, 1.0, 1.0]}),
        ("experts", 2, 2, "float32", 1, {}),
        ("experts-shared", 2, 2, "bfloat16", 2, {"expert": True}),
        ("experts-shared", 3, 3, "float32", 1, {}),
        ("gemma", 2, 2, "float32", 2, {}),
        ("gemma", 3, 3, "bfloat16", 1, {}),
        ("learned", 2, 2, "bfloat16", 1, {}),
        ("learned", 3, 3, "float32", 1, {}),
        ("parallel-residual", 2, 2, "bfloat16", 2, {}),
        ("parallel-residual", 3, 3, "float32", 1, {}),
        ("normed", 2, 2, "bfloat16", 1, {}),
        ("heads-6-2", 1, 2, "float32", 1, {}),
        ("gemma", 1, 2, "bfloat16", 1, {}),
        ("learned", 1, 2, "float32", 1, {}),
        ("heads-6-2", 2, 4, "bfloat16", 1, {}),
    ],
)
def test_whole_steps_of_ranks_give_the_bits_of_their_parts(
    name: str, tensor: int, world_size: int, dtype: str, threads: int, options: dict[str, object]
) -> None:
    assert run_ranks(world_size, compare, name, tensor, dtype, threads, options) == [True] * world_size


def wholes(ranks: Ranks) -> dict[str, list[bool]]:
    """Of every model, whether its layers and its steps are whole on two ranks."""
    mesh, found = join(ranks, 2), {}
    for name in MODELS:
        stage = make_stage(name, mesh, torch.bfloat16)
        model = make_model(stage)
        batch = model.batch([("a", 1)])
        found[name] = [bool(stage.runs(model.caches[0])), stage.whole(batch, model.caches[0]) is not None]
    mesh.close()
    return found


def test_which_models_are_whole_on_ranks() -> None:
    apart = STEPS_APART | LAYERS_APART
    want = {name: [name not in LAYERS_APART, name not in apart] for name in MODELS}
    assert run_ranks(2, wholes) == [want] * 2


def step_once(stage: Stage, plan: list[tuple[str, int]]) -> None:
    model = make_model(stage)
    stage.step(model.batch(plan), [0], model.caches[0])


def disagree(ranks: Ranks) -> str:
    """Rank 1 is given another number of tokens."""
    mesh = join(ranks, 2)
    stage = make_stage("heads-8-8", mesh, torch.float32)
    with pytest.raises(CollectiveError) as caught:
        step_once(stage, [("a", 1 + ranks.rank)])
    with pytest.raises(CollectiveError, match="unusable after an earlier error"):
        mesh.tensor.barrier()
    mesh.close()
    return str(caught.value)


def test_ranks_of_different_steps_are_told_apart() -> None:
    hidden = SPECS["heads-8-8"]().hidden_size
    for text in run_ranks(2, disagree):
        assert "group tensor" in text and "all_reduce" in text
        assert f"float32[1, {hidden}]" in text and f"float32[2, {hidden}]" in text


def lose(ranks: Ranks, dies: bool) -> str:
    """Rank 1 ends, or just does not come."""
    mesh = join(ranks, 2, timeout_s=20.0 if dies else 1.0)
    stage = make_stage("heads-8-8", mesh, torch.float32)
    if ranks.rank == 1:
        time.sleep(0.0 if dies else 3.0)
        return ""
    with pytest.raises(CollectiveError) as caught:
        step_once(stage, [("a", 1)])
    return str(caught.value)


@pytest.mark.parametrize(("dies", "words"), [(True, "has ended"), (False, "waited 1 s")])
def test_a_rank_that_does_not_come_is_named(dies: bool, words: str) -> None:
    text = run_ranks(2, lose, dies, grace_s=5.0)[0]
    assert words in text and "rank 1 (replica rank 1" in text


def watched(ranks: Ranks) -> list[str]:
    """What the activities say while rank 1 keeps rank 0 waiting, and afterwards."""
    activity = Activity()
    mesh = watch_mesh(join(ranks, 2), activity)
    stage, seen, before = make_stage("heads-8-8", mesh, torch.float32), [], activity.look()[0]
    step_once(stage, [("a", 2)])
    assert activity.look()[0] > before + 2 * len(stage.layers), "sums within C count"
    if ranks.rank == 1:
        time.sleep(1.0)
        seen.append(str(activity.look()[1]))
        step_once(stage, [("a", 2)])
    else:
        waiting = threading.Thread(target=step_once, args=(stage, [("a", 2)]))
        waiting.start()
        time.sleep(0.3)
        first, second = activity.look(), activity.look()
        assert first == second and first[1] is not None
        seen.append(first[1].what)
        waiting.join(10.0)
    seen.append(str(activity.look()[1]))
    mesh.close()
    return seen


def test_who_waits_within_c_says_so() -> None:
    assert run_ranks(2, watched) == [["all_reduce of group tensor", "None"], ["None", "None"]]
