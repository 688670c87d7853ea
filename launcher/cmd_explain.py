"""`shoal explain MODEL`: what would run, before anything runs. Starts no process and reads no weights.

Shows every setting that was set and where it came from (all of them with --all), which rank holds which layers, heads,
columns, experts and vocabulary rows, the ledger of memory per rank with the largest context x concurrency, and how fast
that can be at most. Weights are exact; activations are estimated, since only a running rank can measure them; what the
devices read and multiply is measured, in about a second, or with --gpu taken from a data sheet.
"""

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from shoal.configs.host import available_host_bytes, last_cache_bytes, usable_cores
from shoal.configs.model_path import resolve_model_path
from shoal.configs.resolved import DEFAULT, ResolvedConfig, Setting
from shoal.configs.schema import ShoalConfig
from shoal.launcher.cards import CARDS, CONTEXT_BYTES, Card
from shoal.launcher.explain_layout import LAYOUT_COLUMNS, RankShare, layout_notes, layout_table, rank_shares
from shoal.launcher.explain_speed import SPEED_COLUMNS, DeviceLimits, Rates, limits_line, predict, speed_table
from shoal.launcher.kinds import choose_launcher
from shoal.launcher.settle import Host, settle
from shoal.launcher.tables import text_table
from shoal.model.checkpoint_files import check_headers
from shoal.model.families import load_spec
from shoal.model.families.family import Family
from shoal.model.ledger import CachePlan, MemoryReport, plan_cache
from shoal.model.ledger_table import format_ledger
from shoal.model.memory_estimate import estimate_reports
from shoal.model.safetensors_file import CheckpointError
from shoal.model.shard import ModelShard, shard_model
from shoal.model.spec import DecoderSpec

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
MEASURING_S = 0.25  # for each limit of a device


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """All that is explained. notes: what was left to Shoal, as settled.

    problem: why the cache cannot be sized, with the number to change. plan: None then, and where no device of the kind
    is here to be asked for its memory; rates: None there.
    """

    model: str
    family: str
    notes: list[str]
    settings: list[tuple[str, Any, str]]
    ranks: list[RankShare]
    reports: list[MemoryReport]
    plan: CachePlan | None
    problem: str | None
    rates: Rates | None


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Print the explanation. Returns 0, or 2 when the model would not fit."""
    path = resolved.config.model.path
    assert path is not None, "the command line has made sure of a model"
    folder = resolve_model_path(path, resolved.config.model.revision)
    found = explain(resolved.with_generation_config(folder), folder, None if args.gpu is None else card(args.gpu))
    if args.json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(found), indent=1) + "\n")
    else:
        config = resolved.config
        shards = shard_model(load_spec(folder)[0], config.parallel, config.model.quantization)
        sys.stdout.write(show(found, resolved.config, shards, everything=args.all))
    return 0 if found.problem is None else 2


def card(name: str) -> tuple[str, Card]:
    """A GPU's name and data sheet. Raises ValueError naming those that are known."""
    if name not in CARDS:
        close = difflib.get_close_matches(name, CARDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--gpu {name}: no data sheet of it is here, only of {', '.join(CARDS)}{hint}")
    return name, CARDS[name]


def explain(resolved: ResolvedConfig, folder: Path, gpu: tuple[str, Card] | None = None) -> Explanation:
    """Work everything out from config.json. gpu: of the kind to plan for; None: what is here.

    Raises ValueError when the model cannot be divided as asked.
    """
    config = resolved.config
    spec, family = load_spec(folder)
    gpus, available = seen_gpus(config) if gpu is None else planned_gpus(config, gpu[1])
    on_gpus = config.runtime.device == "cuda" or gpus > 0
    wanted = -(-config.world_size // config.parallel.ranks_per_device) if on_gpus else 0
    host = Host(gpus=wanted, native=config.runtime.native != "off", ranks=config.world_size)
    settled = settle(config, spec, host)
    shards = shard_model(spec, config.parallel, config.model.quantization)
    itemsize = ITEMSIZE[settled.config.model.dtype]
    reports = estimate_reports(
        spec,
        shards,
        settled.config,
        itemsize=itemsize,
        available_bytes=available or 0,
        ranks_per_device=settled.ranks_per_device,
    )
    warning = weights_warning(config, folder, family, spec)
    plan, problem = None, None
    if available is not None:
        try:
            plan = plan_cache(
                reports,
                spec.cache_windows,
                settled.config,
                max_model_len=settled.config.model.max_model_len or spec.max_position,
                device_type=settled.config.runtime.device,
                ranks_per_device=settled.ranks_per_device,
            )
        except ValueError as error:
            problem = str(error)
    limits = None if plan is None else device_limits(settled.config, gpu)
    return Explanation(
        model=config.model.served_model_name or str(config.model.path),
        family=spec.family,
        notes=[*settled.notes, *place_notes(config), *([warning] if warning else [])],
        settings=[settled_row(setting, settled.config) for setting in resolved.settings()],
        ranks=rank_shares(spec, shards),
        reports=reports,
        plan=plan,
        problem=problem,
        rates=predict(spec, shards, settled.config, limits, plan, itemsize) if plan and limits else None,
    )


def device_limits(config: ShoalConfig, gpu: tuple[str, Card] | None) -> DeviceLimits | None:
    """What bounds a step of a settled configuration: by data sheet, or measured here; None where a card had no memory
    free to measure with.
    """
    rounded = config.model.quantization
    if gpu is not None:
        name, sheet = gpu
        rate = sheet.flops_per_s(config.model.dtype, rounded)
        return DeviceLimits(
            source=f"of {name}, by its data sheet", read_bytes_per_s=sheet.read_bytes_per_s, flops_per_s=rate
        )
    import torch

    from shoal.launcher.machine import measure_limits

    kind = config.runtime.device
    if kind == "cpu":
        torch.set_num_threads(min(usable_cores(), config.world_size * (config.runtime.threads or 1)))
    try:
        limits = measure_limits(torch.device(kind), getattr(torch, config.model.dtype), MEASURING_S)
    except torch.OutOfMemoryError:
        return None
    faster = {"none": 1, "fp8": 2}.get(rounded, 4 if kind == "cpu" else 1)  # than floats, at most
    by = f"{limits.threads} {'thread' if limits.threads == 1 else 'threads'} of this host"
    how = "measured now" + (f" with floats, and {faster} times that for {rounded} weights" if faster > 1 else "")
    return DeviceLimits(
        source=f"of {by if kind == 'cpu' else limits.device}, {how}",
        read_bytes_per_s=limits.read_bytes_per_s,
        flops_per_s=faster * limits.gemm_flops_per_s,
        held_bytes=last_cache_bytes() if kind == "cpu" else 0,
    )


def place_notes(config: ShoalConfig) -> list[str]:
    """What may be settled otherwise where the ranks will be."""
    if choose_launcher(config, os.environ) != "ray":
        return []
    return ["as on one host like this; collectives, threads and steps in flight follow from the hosts that Ray gives"]


def weights_warning(config: ShoalConfig, folder: Path, family: Family, spec: DecoderSpec) -> str | None:
    """Why a start would refuse the folder's weights, as far as their headers tell; None when it would not."""
    if config.model.load_format == "dummy":
        return None
    try:
        check_headers(folder, family, spec)
    except CheckpointError as error:
        return f"a start would refuse the weights: {error}"
    return None


def settled_row(setting: Setting, settled: ShoalConfig) -> tuple[str, Any, str]:
    """A setting with what was left to Shoal resolved, as far as it is resolved before a start (a drawn seed is not)."""
    section, _, name = setting.key.partition(".")
    if section == "sampling" or setting.key == "runtime.seed":
        return tuple(setting)
    value = getattr(getattr(settled, section), name)
    return (setting.key, value, setting.source if value == setting.value else f"{setting.source}, resolved")


def seen_gpus(config: ShoalConfig) -> tuple[int, int | None]:
    """GPUs here, and the bytes an idle device of the kind that would be used can give; None when no such device is
    here.
    """
    if config.runtime.device != "cpu":
        import torch

        count = torch.cuda.device_count()
        if count:
            return count, min(torch.cuda.mem_get_info(index)[0] for index in range(count))
        if config.runtime.device == "cuda":
            return 0, None
    return 0, available_host_bytes()


def planned_gpus(config: ShoalConfig, sheet: Card) -> tuple[int, int]:
    """As `seen_gpus`, of cards that are not here, as many as there are ranks to have one."""
    if config.runtime.device == "cpu":
        raise ValueError("--gpu plans for GPUs, and runtime.device = cpu; leave one of them out")
    return config.world_size, sheet.memory_bytes - CONTEXT_BYTES


def show(found: Explanation, config: ShoalConfig, shards: list[ModelShard], *, everything: bool) -> str:
    """The explanation as text: settings, layout, memory."""
    layout = config.parallel
    shown = [row for row in found.settings if everything or row[2] != DEFAULT]
    parts = [
        "\n".join([f"{found.model}: {found.family}", *found.notes]),
        "Settings" + ("" if everything else " (those that were set; --all shows every one)"),
        text_table(("key", "value", "from"), [(key, show_value(value), source) for key, value, source in shown])
        if shown
        else "all have their defaults",
        "Who holds what" + (f" (each of {layout.data} replicas)" if layout.data > 1 else ""),
        text_table(LAYOUT_COLUMNS, layout_table(found.ranks)),
        "\n".join(layout_notes(found.ranks)),
        "Memory (activations are estimated; starting measures them)",
    ]
    parts.append(format_ledger(found.reports, shards, config.cache.reserve, found.plan))
    if found.problem is not None:
        parts.append(f"does not fit: {found.problem}")
    elif found.plan is None:
        parts.append(
            "No GPU is seen here, so neither what its memory leaves for the cache nor its speed can be told: name one "
            f"with --gpu ({', '.join(CARDS)})."
        )
    if found.plan is not None and found.rates is None:
        parts.append("No GPU memory is free to measure its speed with.")
    elif found.rates is not None:
        parts += [
            f"Speed, at most: {limits_line(found.rates.limits)}.\n"
            "Exchanges between ranks and all else come on top; `shoal bench` tells what is reached.",
            text_table(SPEED_COLUMNS, speed_table(found.rates)),
        ]
    return "\n\n".join(parts) + "\n"


def show_value(value: Any) -> str:
    """A setting's value as YAML people write it."""
    return json.dumps(value) if not isinstance(value, str) else value
