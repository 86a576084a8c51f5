"""Kernels are compiled once: kept whole, found again by every later process, and never trusted to anybody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import index_builders
from vecsvc import machine_code

HERE = Path(__file__).parent
NAME, ARITY, TRIAL = "address", 1, np.arange(3)


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(machine_code, "announce", said.append)
    return said


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A folder for kernels of this test's own."""
    before = list(machine_code._places)
    machine_code.keep_in(tmp_path / "kernels")
    yield tmp_path / "kernels"
    machine_code._places[:] = before


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Loads a kernel as a new process would, and says whether it works."""

    def loaded() -> int:
        monkeypatch.setattr(machine_code, "_loaded", {})
        kernel = machine_code.load("kernels_for_tests", NAME, ARITY)
        assert kernel(id(TRIAL)) == TRIAL.ctypes.data
        return len(machine_code._loaded)

    return loaded


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
from pathlib import Path
import numpy as np
from vecsvc import machine_code
said = []
machine_code.announce = said.append
machine_code.keep_in(Path(sys.argv[1]))
kernel = machine_code.load("kernels_for_tests", "address", 1)
array = np.arange(5)
assert kernel(id(array)) == array.ctypes.data
print(len(said), "numba" in sys.modules)
"""


# ---------------------------------------------------------------------------------------------------- kept


def test_a_kernel_is_compiled_once_and_then_found(kept: Path, announced: list[str], load: Callable[[], int]) -> None:
    load()
    (file,) = kept.iterdir()
    assert announced == [f"compiling kernel address for {machine_code.best_path()}, some seconds"]
    assert file.name.startswith(f"address-{machine_code.best_path()}-") and file.suffix == ".o"
    before = file.stat()
    load()
    assert len(announced) == 1 and list(kept.iterdir()) == [file]
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_another_process_finds_it_and_leaves_numba_alone(kept: Path, load: Callable[[], int]) -> None:
    load()
    assert python(LOAD, str(kept)).split()[:2] == ["0", "False"]


def test_processes_that_compile_at_once_do_each_other_no_harm(
    tmp_path: Path, announced: list[str], kept: Path, load: Callable[[], int]
) -> None:
    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(lambda _: python(LOAD, str(kept)), range(3)))
    assert any(line.startswith("1") for line in said)
    assert len(list(kept.iterdir())) == 1  # and nothing half-written beside it
    load()
    assert not announced


def test_threads_that_ask_at_once_compile_once(
    kept: Path, announced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "_loaded", {})
    with ThreadPoolExecutor(4) as threads:
        kernels = list(threads.map(lambda _: machine_code.load("kernels_for_tests", NAME, ARITY), range(8)))
    assert len(announced) == 1 and len(set(map(id, kernels))) == 1


@pytest.mark.parametrize("damage", ["empty", "half", "digest", "code", "last byte", "more", "folder"])
def test_a_damaged_object_is_compiled_anew_and_replaced(
    damage: str, kept: Path, announced: list[str], load: Callable[[], int]
) -> None:
    load()
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    changed = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "digest": b"0" * 64 + whole[64:],
        "code": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        "last byte": whole[:-1],
        "more": whole + b"\0",
    }
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(changed[damage])
    load()
    assert len(announced) == 2
    if damage == "folder":
        assert list(kept.iterdir()) == [file]  # it stands in the way, and nothing is left beside it
    else:
        assert file.read_bytes() == whole
        load()
        assert len(announced) == 2


def test_an_object_has_one_symbol_and_asks_for_none(kept: Path, load: Callable[[], int]) -> None:
    load()
    (file,) = kept.iterdir()
    code = file.read_bytes()[64:]
    assert code[:4] == b"\x7fELF" and b"vecsvc_address" in code
    assert b"Py_" not in code and b"numba" not in code and b"NRT_" not in code


# ------------------------------------------------------------------------------------- folders not trusted


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_may_write_into_is_not_used(
    mode: int, tmp_path: Path, announced: list[str], kept: Path, load: Callable[[], int]
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    machine_code.keep_in(tmp_path / "open")
    assert machine_code.folder() is None
    load()
    assert not list((tmp_path / "open").iterdir())
    assert f"every start will: others may write into {tmp_path / 'open'}; choose a folder of your own" in announced[0]


def test_a_folder_below_one_that_everybody_may_write_into_is_not_used(tmp_path: Path, kept: Path) -> None:
    tmp_path.chmod(0o777)
    machine_code.keep_in(kept)
    tmp_path.chmod(0o700)
    assert machine_code.folder() is None


def test_a_folder_of_another_account_is_not_used(tmp_path: Path, kept: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(kept, 1234, -1)
    machine_code.keep_in(kept)
    assert machine_code.folder() is None
    assert "belongs to user 1234" in machine_code.reason()


def test_an_object_that_others_may_write_into_is_not_run(
    kept: Path, announced: list[str], load: Callable[[], int]
) -> None:
    load()
    (file,) = kept.iterdir()
    file.chmod(0o664)
    load()
    assert len(announced) == 2


def test_what_is_kept_is_for_its_owner_alone_whatever_the_umask(
    tmp_path: Path, kept: Path, load: Callable[[], int]
) -> None:
    before = os.umask(0o002)
    try:
        machine_code.keep_in(tmp_path / "mine")
        load()
    finally:
        os.umask(before)
    (file,) = (tmp_path / "mine").iterdir()
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600


def test_only_the_last_objects_of_a_kernel_are_kept(kept: Path, load: Callable[[], int]) -> None:
    for version in range(machine_code.KEPT + 3):
        old = kept / f"address-{machine_code.best_path()}-{version}.o"
        old.write_bytes(b"")
        os.utime(old, (version, version))
    (kept / ".address.o.1.2").write_bytes(b"")
    os.utime(kept / ".address.o.1.2", (0, 0))
    load()
    assert len(list(kept.iterdir())) == machine_code.KEPT


def test_where_no_folder_can_be_made_kernels_work_all_the_same(
    tmp_path: Path, announced: list[str], kept: Path, load: Callable[[], int]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        machine_code.keep_in(place)
        assert machine_code.folder() is None
    load()
    assert len(announced) == 1


def test_an_account_without_a_home_has_no_folder(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    machine_code.keep_in(None)
    assert machine_code.folder() is None


def test_a_full_disk_costs_the_next_start_its_time_and_nothing_else(
    kept: Path, announced: list[str], load: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, *, private: bool) -> None:
        path.write_bytes(data[:10])
        raise machine_code.StorageError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr(machine_code, "write_file", full)
        load()
    assert not list(kept.iterdir())
    load()
    assert len(announced) == 2 and len(list(kept.iterdir())) == 1


# --------------------------------------------------------------------------------------------- fingerprints


def fingerprint(module: str = "kernels_for_tests", name: str = NAME, arity: int = ARITY, path: str = "portable") -> str:
    return machine_code._fingerprint(module, name, arity, path)


def test_everything_that_code_depends_on_changes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {fingerprint(), fingerprint(name="other"), fingerprint(arity=2), fingerprint(path="avx2")}
    known.add(fingerprint(module="vecsvc.kernels"))
    assert len(known) == 5 and fingerprint() in known
    version = machine_code.importlib.metadata.version
    for library in ("numba", "llvmlite"):
        with monkeypatch.context() as other:
            other.setattr(
                machine_code.importlib.metadata, "version", lambda of, its=library: version(of) + "1" * (of == its)
            )
            assert fingerprint() not in known
    for library in ("host", "features"):
        with monkeypatch.context() as other:
            other.setattr(machine_code, "_target", lambda path, its=library: (its, ""))
            assert fingerprint() not in known


@pytest.mark.parametrize("source", ["kernels_for_tests", *machine_code._SOURCES])
def test_a_changed_source_changes_the_name(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    spec = machine_code.importlib.util.find_spec(source)
    assert spec is not None and spec.origin is not None
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == Path(str(spec.origin))))
    assert fingerprint() != before


# -------------------------------------------------------------------------------------------------- limits


def test_a_kernel_that_calls_something_is_refused_by_the_name_of_what_it_calls(kept: Path) -> None:
    with pytest.raises(AssertionError, match=r"kernel stranger calls \w*gamma\w*; a kernel may call nothing"):
        machine_code.load("kernels_for_tests", "stranger", 1)
    assert not list(kept.iterdir())


def test_paths_are_compiled_one_after_the_other_in_any_order(kept: Path) -> None:
    here = machine_code.PATHS[machine_code.PATHS.index(machine_code.best_path()) :]
    for path in (*here, *reversed(here)):
        code = machine_code._compile("index_builders.nng_kernels", "nng_choose", 9, path)
        # VNNI's own instructions are nowhere but where they may be; the code differs by path.
        assert code[:4] == b"\x7fELF"
    assert len({machine_code._compile("index_builders.nng_kernels", "nng_choose", 9, path) for path in here}) == len(
        here
    )


SEARCH = """
import pickle, sys
def loads(*arguments, **named): raise AssertionError("something was unpickled")
pickle.loads = pickle.load = loads
pickle.Unpickler = None
from pathlib import Path
import numpy as np
from vecsvc import indexes, machine_code
from vecsvc.types import IndexSpec
vectors = np.load(sys.argv[1] + "/vectors.npy")
spec = IndexSpec("nng", 8, "l2", 200, {"degree": 64, "rerank": "vectors"})
index = indexes.load(Path(sys.argv[1]), spec, vectors=vectors)
assert index.search(vectors, 1).labels[:, 0].tolist() == list(range(200))
print("numba" in sys.modules, "index_builders" in sys.modules, any("_kernels" in m for m in sys.modules))
"""


def test_a_service_with_kept_kernels_searches_without_numba_and_unpickles_nothing(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((200, 8)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    index_builders.build(vectors, kind="nng", metric="l2").save(tmp_path)
    assert machine_code.folder() is not None
    assert python(SEARCH, str(tmp_path)).split() == ["False", "False", "False"]
