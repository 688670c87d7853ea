"""The ledger as a plain-text table: memory per rank, blocks per cache group, largest context x concurrency. No
torch.
"""

from collections.abc import Sequence

from shoal.model.ledger import CachePlan, MemoryReport, size
from shoal.model.shard import ModelShard

SHORTER = (1, 2, 4, 16, 64)  # contexts shown: max_model_len divided by these


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns: the first left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def concurrency_line(plan: CachePlan) -> str:
    """Largest context x concurrency, then shorter contexts until max_num_seqs is the limit."""
    entries: list[str] = []
    for length in dict.fromkeys(max(1, plan.max_model_len // part) for part in SHORTER):
        count = plan.concurrency(length)
        capped = " (max_num_seqs)" if count == plan.max_num_seqs else ""
        entries.append(f"{length} tokens x {count:.1f} sequences{capped}")
        if capped:
            break
    return ", ".join(entries)


def format_ledger(
    reports: Sequence[MemoryReport],
    shards: Sequence[ModelShard],
    reserve_bytes: int,
    plan: CachePlan | None = None,
) -> str:
    """The table, one line per rank in rank order, without a last newline.

    plan: None when the devices' memory is not known; the cache columns are left out then.
    """
    head = ["rank", "stage", "shard", "layers", "weights", "activations", "reserve"]
    rows = [head + (["KV cache", "sum", "may use"] if plan else [])]
    for index, (report, shard) in enumerate(zip(reports, shards, strict=True)):
        rest = report.weights_bytes + report.activation_bytes + reserve_bytes
        row = [
            str(report.rank),
            str(shard.pp_rank),
            str(shard.tp_rank),
            f"{shard.first_layer}-{shard.last_layer - 1}",
            size(report.weights_bytes),
            size(report.activation_bytes),
            size(reserve_bytes),
        ]
        if plan:
            cache = plan.cache_bytes[index]
            row += [size(cache), size(rest + cache), size(plan.share_bytes[index])]
        rows.append(row)
    lines = align(rows)
    if plan:
        for window, count in zip(plan.windows, plan.num_blocks, strict=True):
            name = "full attention" if window is None else f"window {window}"
            lines.append(f"cache, {name}: {count} blocks x {plan.block_size} tokens = {count * plan.block_size} tokens")
        lines.append(f"largest context x concurrency: {concurrency_line(plan)}")
    return "\n".join(lines)
