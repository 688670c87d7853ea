"""Building the C kernels: once per content, safely among processes, with a clear word when it cannot be done."""

import ctypes
import fcntl
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.kernels import build

SOURCE = "#include <stdint.h>\nint64_t shoal_answer(int64_t x) { return x + %d; }\n"


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty cache, one small source, and no choice made yet."""
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "answer.c").write_text(SOURCE % 1)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    for name, value in {"library": None, "made": False, "loaded": None, "warned": False}.items():
        monkeypatch.setattr(build._Choice, name, value)
    return sources


def answer(library: build.NativeLibrary | None) -> int:
    assert library is not None
    return library.function("shoal_answer", (ctypes.c_int64,), ctypes.c_int64)(41)


def compiler_script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_builds_loads_and_becomes_the_choice_of_the_process(sandbox):
    library = build.load_native("require")
    assert answer(library) == 42
    assert build.native_library() is library
    assert build.load_native("auto") is library
    assert build.load_native("off") is None and build.native_library() is None


def test_a_terminal_sees_how_far_the_build_is_and_nobody_else(sandbox, monkeypatch, capsys):
    (sandbox / "other.c").write_text("int shoal_other(void) { return 1; }\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    build.build_native("require")
    written = capsys.readouterr().err
    assert ": 1 of 2" in written and ": 2 of 2" in written and written.endswith("\r\x1b[2K")
    build.build_native("require")
    assert capsys.readouterr().err == "", "it is there already"
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    (sandbox / "other.c").write_text("int shoal_other(void) { return 2; }\n")
    build.build_native("require")
    assert capsys.readouterr().err == ""


def test_is_built_once_per_content(sandbox):
    first = build.build_native("require")
    stamp = first.path.stat().st_mtime_ns
    assert build.build_native("require") == first and first.path.stat().st_mtime_ns == stamp
    (sandbox / "answer.c").write_text(SOURCE % 2)
    second = build.build_native("require")
    assert second.fingerprint != first.fingerprint
    assert answer(build.load_native("require")) == 43
    assert not list(first.path.parent.glob("*.tmp"))


def test_a_changed_file_costs_its_own_compilation_only(sandbox):
    (sandbox / "other.c").write_text("int shoal_other(void) { return 7; }\n")
    folder = build.build_native("require").path.parent
    before = {path: path.stat().st_mtime_ns for path in folder.glob("object-*.o")}
    (sandbox / "answer.c").write_text(SOURCE % 5)
    build.build_native("require")
    after = {path: path.stat().st_mtime_ns for path in folder.glob("object-*.o")}
    assert len(before) == 2 and len(after) == 3 and before.items() <= after.items()
    (sandbox / "any.h").write_text("/* headers concern every file */\n")
    build.build_native("require")
    assert len(list(folder.glob("object-*.o"))) == 5


def test_many_builders_at_once_agree(sandbox):
    with ThreadPoolExecutor(4) as pool:
        builds = list(pool.map(lambda _: build.build_native("require"), range(4)))
    assert len(set(builds)) == 1
    assert len(list(builds[0].path.parent.glob("*.so"))) == 1


def test_without_a_compiler_auto_warns_once_and_require_raises(sandbox, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, "shoal.kernels"):
        assert build.load_native("auto") is None
        assert build.load_native("auto") is None
    assert len(caplog.records) == 1 and "no C compiler" in caplog.text
    with pytest.raises(build.NativeBuildError, match="install gcc"):
        build.load_native("require")
    monkeypatch.setenv("CC", "nonesuch -O1")
    with pytest.raises(build.NativeBuildError, match="CC=nonesuch -O1 names no program"):
        build.build_native("require")


def test_the_compilers_words_are_shown(sandbox, caplog):
    (sandbox / "broken.c").write_text("int broken(void) { return undeclared_thing; }\n")
    with pytest.raises(build.NativeBuildError, match="undeclared_thing"):
        build.build_native("require")
    with caplog.at_level(logging.WARNING, "shoal.kernels"):
        assert build.load_native("auto") is None
    assert "undeclared_thing" in caplog.text


def test_a_compiler_without_openmp_or_march_still_builds(sandbox, tmp_path, monkeypatch):
    real = build.find_compiler()[0]
    refuse = 'case "$*" in *-fopenmp*|*-march=native*) echo "no such flag" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", compiler_script(tmp_path, "plaincc", f'{refuse}\nexec {real} "$@"'))
    assert answer(build.load_native("require")) == 42


def test_slower_kernels_than_there_could_be_are_told_with_the_reason(sandbox, tmp_path, monkeypatch, caplog):
    real = "".join(build.find_compiler())
    refuse = 'for word; do [ "$word" = -march=native ] && echo "no such processor" >&2 && exit 1; done'
    monkeypatch.setenv("CC", compiler_script(tmp_path, "oldcc", f'{refuse}\nexec {real} "$@"'))
    with caplog.at_level(logging.WARNING, "shoal.kernels"):
        assert answer(build.load_native("require")) == 42
    [record] = caplog.records
    assert "slower" in record.getMessage() and "no such processor" in record.getMessage()


def test_where_tiles_are_refused_the_kernels_are_others(sandbox, monkeypatch):
    (sandbox / "answer.c").write_text(
        "#include <stdint.h>\n#ifdef SHOAL_NO_AMX\n#define MORE 2\n#else\n#define MORE 1\n#endif\n"
        "int64_t shoal_answer(int64_t x) { return x + MORE; }\n"
    )
    found = []
    for allowed, expected in ((True, 42), (False, 43)):
        monkeypatch.setattr(build, "amx_allowed", lambda allowed=allowed: allowed)
        library = build.load_native("require")
        assert answer(library) == expected
        found.append(library.fingerprint)
    assert found[0] != found[1], "they compute other bits"


def test_waiting_for_another_builder_is_bounded(sandbox, monkeypatch):
    done = build.build_native("require")
    done.path.unlink()
    with open(done.path.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(build.NativeBuildError, match=r"has held .* for 0 s"):
            build.build_native("require", timeout_s=0.2)
    assert build.build_native("require", timeout_s=60).path == done.path


def test_an_unwritable_home_falls_back_to_temporary_files(sandbox, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert build.cache_dir() == tmp_path / f"shoal-{os.getuid()}"
    build.cache_dir().chmod(0o777)
    with pytest.raises(build.NativeBuildError, match="set XDG_CACHE_HOME"):
        build.cache_dir()


def test_old_libraries_are_forgotten(sandbox, monkeypatch):
    monkeypatch.setattr(build, "MAX_CACHED", 2)
    for number in range(4):
        (sandbox / "answer.c").write_text(SOURCE % number)
        last = build.build_native("require")
    assert len(list(last.path.parent.glob("*.so"))) == 2 and last.path.exists()


def test_a_missing_function_is_named(sandbox):
    with pytest.raises(build.NativeBuildError, match="shoal_nonesuch"):
        build.load_native("require").function("shoal_nonesuch", ())
