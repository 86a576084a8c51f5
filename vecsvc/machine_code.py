"""Turns numeric kernels into machine code once, keeps it on disk, and loads it without a compiler.

A kernel is a plain Python function of int64 arguments (addresses and counts) in a module whose name ends in
`kernels`. numba translates it, LLVM optimises it for this processor, and what is left is one ELF object with one
symbol that calls nothing but memcpy and its like. Later starts load that object with llvmlite alone: numba is
imported only to compile, and nothing is unpickled, as numba's own cache would have it. Calls go through ctypes, which
lets the GIL go.

The objects are in `folder()`, ~/.cache/vecsvc/kernels unless told otherwise: one file per kernel, named by the hash
of everything that it depends on, so that another version, library or processor finds no file of its own and
compiles. Files appear whole, by rename. Whoever can write machine code there runs it here, so a folder, a file or a
folder above them that others may write into is not used; without a usable folder every start compiles anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import llvmlite.binding as llvm
import numpy as np

from vecsvc import __version__
from vecsvc.errors import BackendMissing, StorageError
from vecsvc.storage import Lease, delete_file, make_folder, rename, write_file

Kernel: TypeAlias = Callable[..., int]

# What the processor can do, the best first. `portable` is what every processor can.
PATHS: Final = ("avx512-vnni", "avx2", "portable")

_SOURCES: Final = (
    "vecsvc.machine_code",
    "vecsvc.kernels",
    "vecsvc.json_kernels",
    "vecsvc.id_kernels",
    "vecsvc.indexes.nng_layout",
    "vecsvc.indexes.nng_kernels",
    "vecsvc.indexes.tp_tree_layout",
    "vecsvc.indexes.tp_tree_kernels",
    "index_builders.nng_layout",
    "index_builders.nng_kernels",
    "index_builders.tp_tree_kernels",
)
_DIGEST_CHARS: Final = 64

KEPT: Final = 8  # objects of one kernel and path: of several versions and libraries side by side
TURN_WAIT_S: Final = 120.0  # for another process that compiles; then this one does it too
STALE_S: Final = 3600.0  # what is half written for so long, nobody is writing

_lock = threading.RLock()
_loaded: dict[tuple[str, str, str], Kernel] = {}
_alive: list[Any] = []  # LLVM's engines own the code: it must outlive every call
_places: list[tuple[Path | None, str]] = []  # the folder in use, and why it takes nothing new


def no_announcement(text: str) -> None:
    """Called with one line when something is about to be compiled; commands put their own way of saying here."""


announce: Callable[[str], None] = no_announcement


def folder() -> Path | None:
    """Where compiled kernels are looked for; None where that would not be safe."""
    return _place()[0]


def reason() -> str:
    """Why newly compiled kernels cannot be kept, with the remedy; "" where they can."""
    return _place()[1]


def keep_in(path: Path | None) -> None:
    """Keep compiled kernels in this folder from now on; None is ~/.cache/vecsvc/kernels."""
    remedy = "choose a folder of your own with --kernels"
    with _lock:
        try:
            wanted = path or Path("~/.cache/vecsvc/kernels").expanduser()
        except RuntimeError:
            _places[:] = [(None, f"this account has no home; {remedy}")]
            return
        if problem := _why_not(wanted):
            _places[:] = [(None, f"{problem}; {remedy}")]
        elif not os.access(wanted, os.W_OK):
            _places[:] = [(wanted, f"{wanted} cannot be written; {remedy}")]
        else:
            _places[:] = [(wanted, "")]


def _place() -> tuple[Path | None, str]:
    with _lock:
        if not _places:
            keep_in(None)
        return _places[0]


def load(module: str, name: str, arity: int, path: str | None = None) -> Kernel:
    """The function `name` of a kernels module as machine code: `arity` int64 in, one int64 out.

    `path` is one of PATHS, by default the best that this processor has. Compiles where no object is kept, and
    says so through `announce`. Threads may call what comes back at once.
    """
    path = path or best_path()
    with _lock:
        known = _loaded.get((module, name, path))
        if known is None:
            known = _loaded[module, name, path] = _link(_object(module, name, arity, path), name, arity)
        return known


@functools.cache  # on a virtual machine the question is answered by the host, which takes longer than a search
def best_path() -> str:
    features = llvm.get_host_cpu_features()
    if all(features.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma")):
        return "avx512-vnni"
    return "avx2" if all(features.get(f) for f in ("avx2", "fma", "f16c")) else "portable"


def _why_not(wanted: Path) -> str:
    """What speaks against machine code out of this folder, which is made where it is missing; "" for nothing."""
    try:
        make_folder(wanted, private=True)
        for place in (wanted.resolve(), *wanted.resolve().parents):
            state = place.stat()
            if state.st_uid not in (0, os.geteuid()):
                return f"{place} belongs to user {state.st_uid}"
            # Others may write into /tmp, but not rename what is not theirs there.
            shared = 0o022 if place == wanted.resolve() else 0 if state.st_mode & stat.S_ISVTX else 0o002
            if state.st_mode & shared:
                return f"others may write into {place}"
    except StorageError as error:
        return str(error).partition(";")[0]
    except (OSError, RuntimeError) as error:
        return f"{wanted}: {error}"
    return ""


def _object(module: str, name: str, arity: int, path: str) -> bytes:
    """The kernel's object file, from the folder or compiled."""
    keep = folder()
    file = keep / f"{name}-{path}-{_fingerprint(module, name, arity, path)}.o" if keep else None
    if file is not None and (kept := _read(file)) is not None:
        return kept
    if file is None or reason():
        announce(f"compiling kernel {name} for {path}, some seconds; every start will: {reason()}")
        return _compile(module, name, arity, path)
    with _turn(file):
        if (kept := _read(file)) is not None:
            return kept  # another process was at it
        announce(f"compiling kernel {name} for {path}, some seconds")
        code = _compile(module, name, arity, path)
        _keep(file, code)
        _forget(file, f"{name}-{path}-*.o")
    return code


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[None]:
    """One process compiles while others wait for what it will keep; the kernel ends the turn of one that dies."""
    lease, end = None, time.monotonic() + TURN_WAIT_S
    while lease is None and not file.exists() and time.monotonic() < end:
        try:
            lease = Lease.take(file.parent, exclusive=True)
        except StorageError:
            break  # a file system without locks: compiling twice does no harm
        if lease is None:
            time.sleep(0.02)
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


def _read(file: Path) -> bytes | None:
    """The object in a file of ours, None where there is none or its digest says that it is damaged."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_uid not in (0, os.geteuid()) or state.st_mode & 0o022:
                return None
            whole = opened.read()
    except OSError:
        return None
    digest, code = whole[:_DIGEST_CHARS], whole[_DIGEST_CHARS:]
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def _forget(file: Path, like: str) -> None:
    """Delete the oldest of a kernel's objects beyond KEPT, and what processes that died left half written."""
    with contextlib.suppress(OSError, StorageError):
        alike = sorted(file.parent.glob(like), key=lambda other: other.stat().st_mtime)
        stale = [other for other in file.parent.glob(".*.o.*") if time.time() - other.stat().st_mtime > STALE_S]
        for other in alike[:-KEPT] + stale:
            delete_file(other)


def _keep(file: Path, code: bytes) -> None:
    """A full disk costs the next start some seconds and nothing else."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        write_file(aside, hashlib.sha256(code).hexdigest().encode() + code, private=True)
        rename(aside, file)
    except StorageError:
        delete_file(aside)


def _fingerprint(module: str, name: str, arity: int, path: str) -> str:
    """Of everything that the machine code depends on."""
    digest = hashlib.sha256(f"{__version__} {module} {name} {arity} {path} {_target(path)}".encode())
    for library in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(library).encode())
    # Read where they lie: asking for the spec of a builder's module would import the builders.
    for source in _SOURCES:
        file = Path(__file__).parents[1].joinpath(*source.split(".")).with_suffix(".py")
        digest.update(file.read_bytes() if file.is_file() else b"")
    if module not in _SOURCES:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:32]


def _target(path: str) -> tuple[str, str]:
    """LLVM's names for the processor and its features, less what `path` does without."""
    if path == "portable":
        return "generic" if llvm.get_default_triple().startswith("x86_64") else llvm.get_host_cpu_name(), ""
    features = llvm.get_host_cpu_features()
    if path == "avx2":
        for feature in features:
            if feature.startswith(("avx512", "avxvnni", "avx10", "amx", "avxifma", "avxneconvert")):
                features[feature] = False
    return llvm.get_host_cpu_name(), features.flatten()


def _machine(path: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = _target(path)
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True)


def _compile(module: str, name: str, arity: int, path: str) -> bytes:
    """numba's IR of the function, behind a symbol of C's calling convention, and nothing else."""
    import numba

    from vecsvc import kernels

    signature = numba.int64(*[numba.int64] * arity)
    with kernels.generating_for(path):
        # A fresh import, so that functions translated for another path are not met again.
        source = _fresh(module)
        translated = numba.cfunc(signature, error_model="numpy")(getattr(source, name))
    inner = translated.native_name.removeprefix("cfunc.")
    arguments = ", ".join(f"i64 %a{i}" for i in range(arity))
    # numba hands results and exceptions back through pointers. Kernels cannot raise, so only the first is read.
    entry = f"""
        define i64 @{_symbol(name)}({arguments}) {{
          %result = alloca i64
          %raised = alloca ptr
          %status = call i32 @{inner}(ptr %result, ptr %raised, {arguments})
          %value = load i64, ptr %result
          ret i64 %value
        }}"""
    ir = llvm.parse_assembly(translated.inspect_llvm() + entry)
    for part in [*ir.functions, *ir.global_variables]:
        if not part.is_declaration and part.name != _symbol(name):
            part.linkage = "internal"
    machine = _machine(path)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(ir, passes)
    strangers = [f.name for f in ir.functions if f.is_declaration and not f.name.startswith(("llvm.", "mem"))]
    if strangers:
        raise AssertionError(f"kernel {name} calls {', '.join(strangers)}; a kernel may call nothing")
    code: bytes = machine.emit_object(ir)
    return code


def _fresh(module: str) -> Any:
    """The kernels module, executed anew under a name of its own, and so are those that it imports functions from."""
    for known in _SOURCES:
        if known.endswith("_kernels"):
            sys.modules.pop(known, None)
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return source


def _symbol(name: str) -> str:
    return f"vecsvc_{name}"


def _check_layout() -> None:
    """kernels.data_of reads where an array's data lies from the array object itself."""
    array = np.zeros(3)
    if ctypes.c_int64.from_address(id(array) + 16).value != array.ctypes.data:
        raise BackendMissing("vecsvc's kernels need CPython with its usual object header; free-threaded builds differ")


def _link(code: bytes, name: str, arity: int) -> Kernel:
    _check_layout()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    address = engine.get_function_address(_symbol(name))
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arity)(address)
