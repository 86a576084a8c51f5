"""Rules of the house that a linter cannot keep: what no file may do, and what only one may."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "vecsvc").rglob("*.py")) + sorted((ROOT / "index_builders").rglob("*.py"))
OURS = SOURCES + sorted((ROOT / "benchmarks").glob("*.py")) + sorted((ROOT / "data").glob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WRITERS = {"write_text", "write_bytes", "unlink", "rename", "rmtree", "copyfileobj", "copy2", "symlink_to"}
OF_OS = {"replace", "remove", "makedirs", "mkdir"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & UNPICKLERS
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False
    assert not {name for name, _ in calls(path)} & {"eval", "exec", "__import__"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "storage.py"], ids=relative)
def test_only_storage_writes_files(path: Path) -> None:
    for name, node in calls(path):
        if name == "open":
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            assert not [m for m in modes if isinstance(m, str) and set(m) & set("wxa+") and set(m) <= set("rwxabt+")]
        # Calls of plain names are storage's own helpers; methods are pathlib's and the like.
        if isinstance(node.func, ast.Attribute):
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            assert name not in WRITERS and not (of_os and name in OF_OS), f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_every_file_says_first_why_it_exists(path: Path) -> None:
    doc = ast.get_docstring(tree(path))
    assert doc and doc.splitlines()[0].rstrip().endswith((".", ":", ";"))


def test_packages_that_own_the_same_module_are_never_in_one_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, needs in {**extras, "core": core}.items():
        text = " ".join(needs)
        assert not ("faiss-cpu" in text and "faiss-gpu" in text), name
        assert text.count("onnxruntime") <= 1, name
        assert name in ("cpu", "gpu") or ("faiss" not in text and "onnxruntime" not in text), name
