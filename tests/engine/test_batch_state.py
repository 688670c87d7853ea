"""BatchState turns plans into tensors and refuses plans that do not fit what it holds."""

import msgspec
import numpy as np
import pytest
import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.batch_state import MOST_PADDED, BatchState, Padding, PlanMismatch, shared_keys
from shoal.engine.messages import NewSequence, PlanRow, StepPlan, TokenRef
from shoal.model.memory_estimate import GraphSizes
from shoal.model.rotary import RotaryTable
from shoal.model.spec import Rope

GREEDY = SamplingParams(temperature=0.0)


def new(name: str, tokens: list[int], blocks: list[int]) -> NewSequence:
    return NewSequence(name, tokens, len(tokens), GREEDY, 0, [], [], [blocks])


def plan(step: int, rows: list[PlanRow], **fields: object) -> StepPlan:
    return StepPlan(epoch=0, step=step, rows=rows, **fields)  # type: ignore[arg-type]


def fresh(block_size: int = 2) -> BatchState:
    return BatchState(block_size, 1, torch.device("cpu"))


def test_mixed_rows_become_ragged_tensors() -> None:
    state = fresh()
    first = plan(0, [PlanRow("a", 0, 3, [], [[]], [5], False)], new_sequences=[new("a", [10, 11, 12, 13], [7, 5])])
    state.apply(first, {})
    batch = state.build(first)
    assert batch.token_ids_T.tolist() == [10, 11, 12]
    assert batch.groups[0].slot_mapping_T.tolist() == [14, 15, 10]
    second = plan(
        1,
        [PlanRow("a", 3, 1, [], [[]], [5], True), PlanRow("b", 2, 3, [], [[9]], [9], True)],
        new_sequences=[new("b", [1, 2, 3, 4, 5], [3, 4])],
    )
    state.apply(second, {})
    batch = state.build(second)
    assert batch.token_ids_T.tolist() == [13, 3, 4, 5]
    assert batch.positions_T.tolist() == [3, 2, 3, 4]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.seq_lens.tolist() == [4, 5]
    assert batch.groups[0].block_table_RB.tolist() == [[7, 5, -1], [3, 4, 9]]
    assert batch.groups[0].slot_mapping_T.tolist() == [11, 8, 9, 18]


def test_rows_of_one_token_reuse_what_is_there() -> None:
    """Rows come and go, change places and get blocks; the same tensors, or larger ones, say so."""
    state = fresh()
    steps: list[tuple[list[PlanRow], list[NewSequence], list[str]]] = [
        ([PlanRow("a", 3, 1, [], [[]], [5], True)], [new("a", [10, 11, 12, 13], [7, 5])], []),
        ([PlanRow("a", 4, 1, [14], [[2]], [2], True)], [], []),
        (
            [PlanRow("b", 0, 1, [], [[]], [9], True), PlanRow("a", 5, 1, [15], [[]], [2], True)],
            [new("b", [20], [9])],
            [],
        ),
        (
            [PlanRow("c", 1, 1, [], [[]], [1], False), PlanRow("b", 1, 1, [21], [[]], [9], True)],
            [new("c", [30, 31], [1])],
            ["a"],
        ),
    ]
    expected = [
        ([13], [3], [4], [[7, 5]], [11]),
        ([14], [4], [5], [[7, 5, 2]], [4]),
        ([20, 15], [0, 5], [1, 6], [[9], [7, 5, 2]], [18, 5]),
        ([31, 21], [1, 1], [2, 2], [[1], [9]], [3, 19]),
    ]
    for step, ((rows, announced, finished), (tokens, positions, lengths, tables, slots)) in enumerate(
        zip(steps, expected, strict=True)
    ):
        made = plan(step, rows, new_sequences=announced, finished_ids=finished)
        state.apply(made, {})
        batch = state.build(made)
        assert batch.token_ids_T.tolist() == tokens and batch.positions_T.tolist() == positions
        assert batch.seq_lens.tolist() == lengths and batch.max_seqlen_k == max(lengths) and batch.max_seqlen_q == 1
        assert batch.cu_seqlens_q.tolist() == list(range(len(rows) + 1))
        (group,) = batch.groups
        assert [row[: len(want)] for row, want in zip(group.block_table_RB.tolist(), tables, strict=True)] == tables
        assert group.slot_mapping_T.tolist() == slots


def test_a_block_table_that_outgrows_its_room_is_made_anew() -> None:
    state = fresh(1)
    first = plan(0, [PlanRow("a", 0, 1, [], [[]], [0], True)], new_sequences=[new("a", [1], [0])])
    state.apply(first, {})
    state.build(first)
    for position in range(1, 70):
        step = plan(position, [PlanRow("a", position, 1, [position], [[position]], [position], True)])
        state.apply(step, {})
        (group,) = state.build(step).groups
        assert group.block_table_RB[0, : position + 1].tolist() == list(range(position + 1))
        assert group.slot_mapping_T.tolist() == [position]


def test_a_reference_stands_for_the_token_another_step_sampled() -> None:
    state = fresh()
    first = plan(0, [PlanRow("a", 0, 2, [], [[]], [0], True)], new_sequences=[new("a", [1, 2], [0])])
    state.apply(first, {})
    state.build(first)
    second = plan(1, [PlanRow("a", 2, 1, [], [[1]], [1], True, TokenRef(0, 0))])
    state.apply(second, {(0, 0): 77})
    assert state.build(second).token_ids_T.tolist() == [77]


GOOD = PlanRow("a", 0, 2, [], [[]], [0], True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (msgspec.structs.replace(GOOD, request_id="x"), "never announced"),
        (msgspec.structs.replace(GOOD, num_tokens=3), "needs 3 tokens, 2 are known"),
        (msgspec.structs.replace(GOOD, last_block_ids=[1]), "ends with block 0"),
        (msgspec.structs.replace(GOOD, draft_token_ids=[5]), "draft tokens"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(row: PlanRow, message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        fresh().apply(plan(0, [row], new_sequences=[new("a", [1, 2], [0])]), {})


def test_a_row_that_skips_a_position_is_refused() -> None:
    state = fresh()
    first = plan(0, [PlanRow("a", 0, 2, [], [[]], [0], True)], new_sequences=[new("a", [1, 2], [0])])
    state.apply(first, {})
    state.build(first)
    with pytest.raises(PlanMismatch, match="starts at position 1"):
        state.apply(plan(1, [PlanRow("a", 1, 2, [3], [[1]], [1], True)]), {})


def test_finished_sequences_are_forgotten() -> None:
    state = fresh()
    state.apply(plan(0, [GOOD], new_sequences=[new("a", [1, 2], [0])]), {})
    state.apply(plan(1, [], finished_ids=["a"]), {})
    assert not state.sequences


def test_shared_keys_are_the_whole_blocks_that_all_rows_hold_and_all_queries_see() -> None:
    table = np.full((5, 40), -1, np.int32)
    table[:, :30] = np.arange(30)
    table[:, 30:33] = np.arange(100, 115).reshape(5, 3)
    assert shared_keys(table, 1000, 16) == 480
    assert shared_keys(table, 479, 16) == 464  # the first query of some row is at position 479
    assert shared_keys(table, 255, 16) == 0 and shared_keys(table[:3], 1000, 16) == 0  # would not pay
    table[2, 20] = 7
    assert shared_keys(table, 1000, 16) == 320
    table[2, 3] = 7
    assert shared_keys(table, 1000, 16) == 0
    table[:, 0] = -1  # a window that has moved on
    assert shared_keys(table, 1000, 16) == 0


@pytest.mark.parametrize("max_model_len", [512, 1000, 1500, 3000, 4096, 131072])
def test_rotary_tables_stay_where_graphs_have_seen_them(max_model_len: int) -> None:
    """Whatever steps are padded to, which may be more than the longest sequence."""
    rope = Rope(rotary_dim=4, theta=1e4, max_position=max_model_len)
    table = RotaryTable(rope, max_model_len, torch.device("cpu"), whole=True)
    place = table.up_to(1).data_ptr()
    length = 512
    while length < 8 * max_model_len:
        assert table.up_to(length).data_ptr() == place and len(table.up_to(length)) == max_model_len
        length *= 2


def padded(shared_keys: int = 1 << 30) -> BatchState:
    return BatchState(2, 1, torch.device("cpu"), Padding(GraphSizes((1, 4), (4,), (16,)), shared_keys))


def test_padded_rows_repeat_the_shortest_and_write_nowhere() -> None:
    state = padded()
    made = plan(
        0,
        [PlanRow("a", 3, 1, [], [[]], [5], True), PlanRow("b", 1, 1, [], [[]], [9], True)],
        new_sequences=[new("a", [10, 11, 12, 13], [7, 5]), new("b", [20, 21], [9])],
    )
    state.apply(made, {})
    batch = state.build(made)
    assert batch.num_rows == batch.num_tokens == 4 and batch.settings is not None and not batch.has_gaps
    assert batch.token_ids_T.tolist() == [13, 21, 21, 21] and batch.seq_lens.tolist() == [4, 2, 2, 2]
    assert batch.groups[0].slot_mapping_T.tolist() == [11, 19, -1, -1]
    assert batch.groups[0].block_table_RB[:, 0].tolist() == [7, 9, 9, 9]
    assert batch.settings.drawn[:2].tolist() == [0, 0]
    later = plan(1, [PlanRow("b", 2, 1, [22], [[3]], [3], True), PlanRow("a", 4, 1, [14], [[2]], [2], True)])
    state.apply(later, {})
    again = state.build(later)
    assert again is batch and batch.token_ids_T.tolist() == [22, 14, 22, 22]
    assert batch.groups[0].block_table_RB[:, :3].tolist()[1] == [7, 5, 2]
    assert batch.groups[0].block_table_RB[:, :2].tolist()[3] == [9, 3]
    assert batch.settings.drawn[:2].tolist() == [1, 1]


def test_rows_beyond_a_steps_never_keep_the_table_of_one_that_has_gone() -> None:
    """Padded, then full, then padded as before: the last has the shortest row's blocks again."""
    state, names = padded(), "abcd"
    for step, present in enumerate(("abc", "abcd", "abc", "ab")):
        announced = [new(name, [1] * 9, [10 * names.index(name)] * 4) for name in present] if step == 0 else []
        announced += [new("d", [1] * 9, [99])] if step == 1 else []
        rows = [
            PlanRow(name, step, 1, [], [[]], [99 if name == "d" else 10 * names.index(name)], False) for name in present
        ]
        finished = ["d"] if step == 2 else ["c"] if step == 3 else []
        made = plan(step, rows, new_sequences=announced, finished_ids=finished)
        state.apply(made, {})
        batch = state.build(made)
        assert batch.num_rows == 4
        for row in range(len(present), 4):
            assert batch.groups[0].block_table_RB[row, :4].tolist() == [0, 0, 0, 0]


def test_mixed_steps_are_padded_from_the_second_of_a_size_on() -> None:
    state = padded()
    for step in range(2):
        names = [f"a{step}", f"b{step}"]
        made = plan(
            step,
            [PlanRow(names[0], 0, 3, [], [[]], [5], False), PlanRow(names[1], 1, 2, [], [[]], [4], True)],
            new_sequences=[new(names[0], [10, 11, 12, 13], [7, 5]), new(names[1], [1, 2, 3], [6, 4])],
        )
        state.apply(made, {})
        batch = state.build(made)
        assert (batch.settings is None) == (step == 0)
    assert batch.num_rows == 4 and batch.num_tokens == 16 and batch.has_gaps
    assert batch.token_ids_T.tolist() == [10, 11, 12, 2, 3] + [0] * 11
    assert batch.positions_T.tolist()[:5] == [0, 1, 2, 1, 2]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 5, 5, 5] and batch.seq_lens.tolist() == [3, 3, 0, 0]
    assert batch.groups[0].slot_mapping_T.tolist() == [14, 15, 10, 13, 8] + [-1] * 11
    assert batch.settings is not None and batch.settings.ends is not None
    assert batch.settings.ends.tolist() == [2, 4, 0, 0]


def test_rows_that_share_a_long_prefix_are_not_padded() -> None:
    state = padded(shared_keys=256 * 3)
    blocks = list(range(200))
    made = plan(
        0,
        [PlanRow(name, 400, 1, [], [[]], [200 + index], True) for index, name in enumerate("abcd")],
        new_sequences=[new(name, [1] * 401, [*blocks, 200 + index]) for index, name in enumerate("abcd")],
    )
    state.apply(made, {})
    assert state.build(made).settings is None


def test_batches_that_are_not_used_any_more_are_dropped() -> None:
    state = padded()
    made = plan(0, [PlanRow("a", 0, 1, [], [[]], [0], True)], new_sequences=[new("a", [1], [0])])
    state.apply(made, {})
    state.padded.update({(1, 1, width): None for width in range(MOST_PADDED)})  # type: ignore[misc]
    assert state.build(made).settings is not None
    assert len(state.padded) == MOST_PADDED and (1, 1, 0) not in state.padded
