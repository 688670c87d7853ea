"""`shoal doctor`: is this machine ready, how fast is it, and what to do where it is not.

Checks versions, devices, memory, the C kernels' compiler, shared memory, and every collective over local processes;
measures how fast memory is read and matrices are multiplied. Ends with 1 when something that is needed fails.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Literal

import msgspec

from shoal.configs.host import available_host_bytes, usable_cores
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.version import VERSION
from shoal.launcher.processes import LaunchError, Zygote, describe_exit
from shoal.launcher.tables import text_table

Status = Literal["pass", "warn", "fail", "info"]
TRIAL_TIMEOUT_S = 60.0
LEAST_SHARED_BYTES = 64 << 20
LEAST_FILES = 1024
OPTIONAL = {
    "transformers": "tokenizers without tokenizer.json",
    "matplotlib": "pictures of `shoal bench`",
    "ray": "launcher.kind = ray",
}


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor's table. fix: what to do about a warning or a failure."""

    name: str
    status: Status
    value: str
    fix: str = ""


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Print the findings, then what to do. Returns 1 when something failed."""
    findings = [*software(), *host(), *compiler(), *speed(), *collectives(args.ranks)]
    if args.json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(findings), indent=1) + "\n")
    else:
        rows = [(finding.status, finding.name, finding.value) for finding in findings]
        sys.stdout.write(text_table(("result", "check", "found"), rows) + "\n")
        for finding in findings:
            if finding.fix:
                sys.stdout.write(f"{finding.status}: {finding.name}: {finding.fix}\n")
    return int(any(finding.status == "fail" for finding in findings))


def software() -> Iterator[Finding]:
    """Versions of what is needed and of what is optional."""
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Finding("Python", "pass" if fine else "fail", version, "" if fine else "install Python 3.11 or newer")
    yield Finding("shoal", "info", VERSION)
    torch_version = metadata.version("torch")
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    fine = (major, minor) >= (2, 11)
    yield Finding("torch", "pass" if fine else "fail", torch_version, "" if fine else "install torch 2.11 or newer")
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding(name, "info", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "info", f"not installed; only needed for {purpose}")


def host() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files."""
    yield Finding("cores", "info", str(usable_cores()))
    yield Finding("memory available", "info", f"{available_host_bytes() / 2**30:.1f} GiB")
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    fix = "" if free >= LEAST_SHARED_BYTES else "give the container more shared memory (docker run --shm-size=1g)"
    yield Finding("/dev/shm free", "warn" if fix else "pass", f"{free / 2**20:.0f} MiB", fix)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fix = "" if files >= LEAST_FILES else f"raise the limit of open files: ulimit -n {LEAST_FILES}"
    yield Finding("open files", "warn" if fix else "pass", str(files), fix)


def compiler() -> Iterator[Finding]:
    """Whether the C kernels can be built and loaded."""
    from shoal.kernels.build import NativeBuildError, load_native

    try:
        library = load_native("require")
    except NativeBuildError as error:
        fix = "install a C compiler (apt-get install gcc); without one CPUs take the slower torch path"
        yield Finding("C kernels", "warn", str(error).splitlines()[0], fix)
    else:
        assert library is not None, "require raises without a library"
        yield Finding("C kernels", "pass", f"built, {library.fingerprint[:12]}")


def speed() -> Iterator[Finding]:
    """GPUs, and the limits of the CPU and of every GPU."""
    import torch

    from shoal.launcher.machine import measure_limits

    torch.set_num_threads(usable_cores())
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    if len(devices) == 1:
        yield Finding("GPUs", "info", "none seen")
    for device in devices:
        name = "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        for dtype in (torch.float32, torch.bfloat16):
            limits = measure_limits(device, dtype)
            if dtype == torch.float32:
                yield Finding(f"{name} memory reads", "info", f"{limits.read_bytes_per_s / 1e9:.1f} GB/s")
            yield Finding(f"{name} GEMM {limits.dtype}", "info", f"{limits.gemm_flops_per_s / 1e9:.0f} GFLOP/s")


def collectives(num_ranks: int) -> Iterator[Finding]:
    """Every backend that this machine should have, over num_ranks local processes."""
    import torch

    from shoal.kernels.build import load_native

    backends = ["gloo"]
    if load_native("auto") is not None:
        backends.insert(0, "shm")
    if torch.cuda.device_count() >= num_ranks > 1:
        backends.append("nccl")
    try:
        zygote = Zygote(("torch", "shoal.launcher.doctor_ranks"))
        try:
            zygote.loaded(TRIAL_TIMEOUT_S)
            for backend in backends:
                yield try_backend(zygote, backend, num_ranks)
        finally:
            zygote.close()
    except LaunchError as error:
        yield Finding("local processes", "fail", str(error).splitlines()[0], "see the messages above")


def try_backend(zygote: Zygote, backend: str, num_ranks: int) -> Finding:
    """Run one backend's trial on num_ranks forked ranks."""
    from shoal.launcher.doctor_ranks import Trial

    name = f"collectives {backend}, {num_ranks} ranks"
    with tempfile.TemporaryDirectory(prefix="shoal-doctor-") as folder:
        ids = []
        for rank in range(num_ranks):
            trial = Trial(
                backend=backend,
                rank=rank,
                size=num_ranks,
                rendezvous=f"file://{folder}/rendezvous",
                timeout_s=TRIAL_TIMEOUT_S / 2,
            )
            payload = msgspec.msgpack.encode(trial)
            ids.append(zygote.connection.fork(f"doctor {rank}", "shoal.launcher.doctor_ranks:main", payload))
        ended = zygote.connection.wait(ids, TRIAL_TIMEOUT_S)
        zygote.connection.end([rank for rank in ids if rank in zygote.connection.running], 5.0)
    logs = {exited.process_id: exited for exited in ended}
    for rank, process_id in enumerate(ids):
        exited = logs.get(process_id)
        if exited is None:
            return Finding(name, "fail", f"rank {rank} did not finish within {TRIAL_TIMEOUT_S:.0f} s", advice(backend))
        if exited.status != 0:
            last = exited.log.strip().splitlines()[-1:] or [""]
            return Finding(name, "fail", f"rank {rank} {describe_exit(exited)}: {last[0]}", advice(backend))
    found = json.loads(logs[ids[0]].log.strip().splitlines()[-1])
    if found["wrong"]:
        return Finding(name, "fail", f"wrong results: {', '.join(found['wrong'])}", advice(backend))
    times = f"all_reduce 4 KB {found['all_reduce_4kb_us']:.0f} us, 4 MB {found['all_reduce_4mb_ms']:.1f} ms"
    return Finding(name, "pass", times)


def advice(backend: str) -> str:
    """What to do when a backend fails."""
    return {
        "shm": "use --set runtime.collectives=gloo, and report this",
        "gloo": "check that the loopback interface is up and that no firewall stops local connections",
        "nccl": "check the driver (nvidia-smi) and that the GPUs are not in exclusive mode",
    }[backend]
