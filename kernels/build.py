"""Compile the C kernels (kernels/native/*.c) into one shared library, once per content, and load it through ctypes.

Adding an operation needs a new .c file there and nothing here: every .c file is compiled, and the Python side of the
operation declares the prototypes it calls with `NativeLibrary.function`. The library has a plain C interface over
data pointers (no torch headers), so it builds in about a second; the result is cached by the hash of sources, flags,
compiler and processor.

    library = load_native("auto")          # None without a compiler: the operation takes its torch path
    add = library.function("shoal_add_f32", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))

A process chooses once, at start, with load_native(mode); operations ask `native_library()` for that choice.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec

NativeMode = Literal["auto", "require", "off"]

SOURCES = Path(__file__).parent / "native"
BUILD_TIMEOUT_S = 180.0
MAX_CACHED = 8  # libraries kept in the cache; older ones are deleted after a build,
MAX_OBJECTS = 128  # as are objects
COMPILERS = ("cc", "gcc", "clang")
BASE_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")
# Tried in order: a compiler may lack OpenMP's runtime, or not know the processor.
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
ARCH_PRCTL, REQUEST_STATE, TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: how a process asks for AMX's tiles

logger = logging.getLogger("shoal.kernels")


class NativeBuildError(RuntimeError):
    """The C kernels cannot be built or loaded; the text carries the compiler's own words."""


class NativeBuild(msgspec.Struct, frozen=True):
    """A library on disk. fingerprint: hash of sources, flags, compiler and processor; equal fingerprints compute
    equal bits.
    """

    path: Path
    fingerprint: str


class NativeLibrary:
    """The loaded C kernels. handle: the ctypes library; fingerprint: see NativeBuild."""

    def __init__(self, build: NativeBuild) -> None:
        self.path, self.fingerprint = build.path, build.fingerprint
        self.handle = ctypes.CDLL(str(build.path))
        self._functions: dict[str, Any] = {}

    def function(self, name: str, argtypes: Sequence[Any], restype: Any = None) -> Any:
        """The C function `name` with its prototype set; cheap when asked again. Raises NativeBuildError when it is
        not there.
        """
        known = self._functions.get(name)
        if known is not None:
            return known
        try:
            function = getattr(self.handle, name)
        except AttributeError:
            raise NativeBuildError(
                f"{self.path} has no function {name}; was kernels/native changed while running?"
            ) from None
        function.argtypes, function.restype = list(argtypes), restype
        self._functions[name] = function
        return function


class _Choice:
    """What this process decided about the C kernels. Set by load_native."""

    library: NativeLibrary | None = None
    made = False
    loaded: NativeLibrary | None = None
    warned = False


def build_native(mode: NativeMode = "auto", timeout_s: float = BUILD_TIMEOUT_S) -> NativeBuild | None:
    """Make sure the library is on disk and say where. Needs no torch: the launcher calls it once before ranks start.

    Returns None when mode is off, or when it is auto and there is no working compiler (a warning says why, once per
    process). Raises NativeBuildError when mode is require and it cannot be built within timeout_s.
    """
    if mode == "off":
        return None
    try:
        return _build(timeout_s)
    except NativeBuildError as error:
        if mode == "require":
            raise
        if not _Choice.warned:
            _Choice.warned = True
            logger.warning("The C kernels are not available, torch's slower paths are used instead: %s", error)
        return None


def load_native(mode: NativeMode = "auto") -> NativeLibrary | None:
    """Build when needed, load, and make this the choice of the process (`native_library`). Loads torch first: OpenMP
    is shared with it.

    Returns and raises as build_native does.
    """
    build = build_native(mode)
    library = None
    if build is not None:
        library = _Choice.loaded
        if library is None or library.fingerprint != build.fingerprint:
            library = _load(build)
            _Choice.loaded = library
    _Choice.library, _Choice.made = library, True
    return library


def native_library() -> NativeLibrary | None:
    """The library this process chose with load_native; load_native("auto") is called when it has not chosen."""
    if not _Choice.made:
        load_native("auto")
    return _Choice.library


def _load(build: NativeBuild) -> NativeLibrary:
    import torch  # noqa: F401  its OpenMP runtime must be the one in the process before ours is resolved

    try:
        return NativeLibrary(build)
    except OSError as error:
        raise NativeBuildError(f"cannot load {build.path}: {error}; delete it to have it built again") from error


def _build(timeout_s: float) -> NativeBuild:
    compiler = find_compiler()
    sources = sorted(SOURCES.glob("*.c"))
    if not sources:
        raise NativeBuildError(f"no C sources in {SOURCES}; the installation is incomplete")
    if not amx_allowed():
        compiler = (*compiler, "-DSHOAL_NO_AMX")
    digest = hashlib.sha256()
    for path in sorted([*sources, *SOURCES.glob("*.h")]):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    for part in (*BASE_FLAGS, *sum(OPTIONAL_FLAGS, ()), *compiler, _version(compiler), _processor()):
        digest.update(part.encode() + b"\0")
    fingerprint = digest.hexdigest()[:20]
    target = cache_dir() / f"native-{fingerprint}.so"
    if not target.exists():
        with _locked(target.with_suffix(".lock"), timeout_s):
            if not target.exists():
                _compile(compiler, sources, target, timeout_s)
    return NativeBuild(target, fingerprint)


@functools.cache
def amx_allowed() -> bool:
    """Whether this process, and those it forks, may use AMX's tiles: Linux wants to be asked once. True where the
    processor has none.
    """
    if " amx_tile" not in _processor():
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype, libc.syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    return bool(libc.syscall(ARCH_PRCTL, REQUEST_STATE, TILE_DATA) == 0)


def find_compiler() -> tuple[str, ...]:
    """The command of the C compiler: $CC (which may carry arguments), else cc, gcc or clang on PATH. Raises
    NativeBuildError.
    """
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        path = shutil.which(command[0])
        if path is None:
            raise NativeBuildError(f"CC={os.environ['CC']} names no program; install it or unset CC")
        return (path, *command[1:])
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return (path,)
    raise NativeBuildError(
        f"no C compiler ({', '.join(COMPILERS)}) on PATH; install gcc (Debian: apt install gcc libc6-dev)"
    )


def cache_dir() -> Path:
    """The folder built libraries are kept in: $XDG_CACHE_HOME/shoal or ~/.cache/shoal, else a private one among the
    temporary files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for path in (Path(home) / "shoal", Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        status = path.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(path, os.W_OK | os.X_OK):
            return path
    raise NativeBuildError(f"neither {home} nor {tempfile.gettempdir()} can hold a private folder; set XDG_CACHE_HOME")


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{shlex.join(compiler)} --version failed: {error}") from error
    return done.stdout


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {line}"
    return f"{platform.machine()} {platform.processor()}"


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting at most timeout_s for another process that builds."""
    deadline = time.monotonic() + timeout_s
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeBuildError(
                        f"another process has held {path} for {timeout_s:.0f} s; end it or delete the file"
                    ) from None
                time.sleep(0.05)
        yield


def _compile(compiler: tuple[str, ...], sources: list[Path], target: Path, timeout_s: float) -> None:
    """Compile, link into a temporary file and move it to target, atomically. Raises NativeBuildError with the messages
    of the first attempt.
    """
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    failure: NativeBuildError | None = None
    try:
        for optional in OPTIONAL_FLAGS:
            command = [*compiler, *BASE_FLAGS, *optional]
            try:
                objects = _objects(command, _version(compiler), sources, target.parent, timeout_s)
                _run([*command, "-shared", "-o", str(temporary), *map(str, objects), "-lm"], timeout_s)
            except NativeBuildError as error:
                failure = failure or error
                continue
            if failure is not None:
                logger.warning("The C kernels are slower than they could be: %s", failure)
            os.replace(temporary, target)
            _forget_old(target.parent)
            return
    finally:
        temporary.unlink(missing_ok=True)
    assert failure is not None
    raise failure


def _objects(command: list[str], version: str, sources: list[Path], folder: Path, timeout_s: float) -> list[Path]:
    """One object per source, compiled side by side unless it is there: a changed file costs its own compilation."""
    shared = hashlib.sha256("\0".join([*command, version, _processor()]).encode())
    for header in sorted(SOURCES.glob("*.h")):
        shared.update(header.read_bytes())

    def one(source: Path) -> Path:
        digest = shared.copy()
        digest.update(source.read_bytes())
        path = folder / f"object-{source.stem}-{digest.hexdigest()[:20]}.o"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                _run([*command, "-c", "-o", str(temporary), str(source)], timeout_s)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(_counted(pool.map(one, sources), len(sources)))


def _counted(paths: Iterable[Path], total: int) -> Iterator[Path]:
    """The same paths; a line on standard error counts them where that is a terminal, and is gone at the end."""
    shown = sys.stderr.isatty()

    def tell(text: str) -> None:
        if shown:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    try:
        tell("building the C kernels, once for this machine")
        for done, path in enumerate(paths, start=1):
            tell(f"building the C kernels, once for this machine: {done} of {total}")
            yield path
    finally:
        tell("")


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{shlex.join(command)} failed: {error}") from error
    if done.returncode:
        words = done.stderr.strip() or done.stdout.strip()
        raise NativeBuildError(f"{shlex.join(command)} ended with status {done.returncode}:\n{words}")


def _forget_old(folder: Path) -> None:
    """Keep the newest of what was built. A process that has a library loaded keeps its mapping."""
    for pattern, count in (("native-*.so", MAX_CACHED), ("object-*.o", MAX_OBJECTS)):
        with contextlib.suppress(OSError):  # another process may be doing the same
            built = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in built[count:]:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
