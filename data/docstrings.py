"""Writes data/corpus.parquet: real texts that every machine has, the docstrings of its Python and its packages.

Source is parsed, never imported, so that reading a package runs none of it; the C modules of the standard library,
which have no source, are the exception. A thing is named by the shortest public path that leads to it: where it is
defined, or where a package's `__init__` takes it up (`numpy.interp`, not `numpy.lib._function_base_impl.interp`).
What has no public path is private and left out, and so are tests, duplicates and very short docstrings.

    python data/docstrings.py --packages stdlib,numpy
    python data/docstrings.py --packages all --without sklearn,scipy
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from docstring_source import Document, Module, documents, parse
from docstring_text import first_sentence, plain_text

CORPUS = Path(__file__).parent / "corpus.parquet"
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "package", "kind", "signature", "title", "text")])
STDLIB = "stdlib"  # in `packages` and `without`: every module of the standard library
SAMPLE = (STDLIB, "aiohttp", "click", "numpy")  # what is read unless others are named: some 7,000 documents
MIN_CHARS = 20  # of what a docstring says; shorter ones say nothing that can be searched for
MAX_SOURCE_BYTES = 2 << 20  # of one file; larger ones are tables

# What has no source, by the name under which it is documented.
C_MODULES = {
    "_collections": "collections", "_csv": "csv", "_functools": "functools", "_io": "io", "_random": "random",
    "_socket": "socket", "_sqlite3": "sqlite3", "_struct": "struct", "array": "array", "binascii": "binascii",
    "builtins": "", "cmath": "cmath", "gc": "gc", "itertools": "itertools", "math": "math", "mmap": "mmap",
    "nt": "os", "posix": "os", "select": "select", "sys": "sys", "time": "time", "unicodedata": "unicodedata",
    "zlib": "zlib",
}  # fmt: skip
NOT_READ = {
    "test", "tests", "testing", "_testing", "conftest", "idlelib", "lib2to3", "turtledemo", "ensurepip", "vendor",
    "vendored", "_vendor", "_vendored", "distutils", "_distutils", "encodings", "pydoc_data", "externals", "extern",
    "examples", "benchmarks", "antigravity", "this", "__main__", "__pycache__", "site-packages", "dist-packages",
    "lib-dynload",
}  # fmt: skip


def read(
    *,
    packages: Collection[str] = (),
    without: Collection[str] = (),
    sites: Sequence[Path] | None = None,
    limit: int | None = None,
) -> pa.Table:
    """The documents, with the columns of SCHEMA: the standard library's first, then package by package, by id.

    `packages` names the top-level packages to read (all, where none is named), `without` those to leave out; `stdlib`
    stands for the whole standard library. `sites` are the folders of packages, this Python's own where None. With a
    `limit`, so many documents, spread evenly over all of them. The same arguments give the same table.
    """
    rows: list[tuple[str, ...]] = []
    ids: set[str] = set()
    said: set[str] = set()
    for document in _all(packages, without, _own_sites() if sites is None else sites):
        words = plain_text(document.docstring)
        if len(words) < MIN_CHARS or words in said or document.name in ids:
            continue
        said.add(words)
        ids.add(document.name)
        text = f"{document.name}: {words}"
        rows.append(
            (document.name, document.package, document.kind, document.signature, first_sentence(words), text),
        )
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)


def write(path: Path = CORPUS, table: pa.Table | None = None) -> Path:
    pq.write_table(read() if table is None else table, path)
    return path


def _all(packages: Collection[str], without: Collection[str], sites: Sequence[Path]) -> Iterator[Document]:
    def wanted(*names: str) -> bool:
        return (not packages or any(name in packages for name in names)) and not any(name in without for name in names)

    if STDLIB not in without and (not packages or STDLIB in packages or set(packages) & sys.stdlib_module_names):
        yield from _in_order(d for d in _standard_library() if wanted(d.package, STDLIB))
    for site in sites:
        for top in _tops(site):
            if wanted(top.stem) and not top.stem.startswith("_"):
                yield from _in_order(documents(_modules(site, [top])))


@functools.cache
def _standard_library() -> list[Document]:
    """Read as one package: public modules take up names of private ones beside them."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [*documents(_modules(folder, _tops(folder))), *_of_c_modules()]


def _in_order(found: Iterable[Document]) -> list[Document]:
    return sorted(found, key=lambda document: (document.package, document.name))


def _own_sites() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


def _tops(folder: Path) -> list[Path]:
    """The packages and modules that lie in a folder, in the order of their names."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.stem not in NOT_READ and (path.suffix == ".py" or (path.is_dir() and path.name.isidentifier()))
    ]


def _modules(folder: Path, tops: Iterable[Path]) -> Iterator[Module]:
    for top in tops:
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            parts = path.relative_to(folder).with_suffix("").parts
            if any(part in NOT_READ or part.startswith("test_") or part.endswith("_test") for part in parts):
                continue
            if path.stat().st_size <= MAX_SOURCE_BYTES and (module := parse(path, parts)) is not None:
                yield module


def _of_c_modules() -> Iterator[Document]:
    for module_name, public in C_MODULES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # another platform's
            continue
        package = public or module_name
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or getattr(value, "__module__", "") == "importlib":
                continue
            path = f"{public}.{name}" if public else name
            yield _of_object(package, path, value)
            if isinstance(value, type):
                own = sorted((key, member) for key, member in vars(value).items() if not key.startswith("_"))
                yield from (_of_object(package, f"{path}.{key}", member) for key, member in own if callable(member))


def _of_object(package: str, name: str, value: object) -> Document:
    signature = getattr(value, "__text_signature__", None) or ""
    for receiver in ("$self, /, ", "$self, /", "$self, ", "$module, /, ", "$module, /", "$module, ", "$type, /, "):
        signature = signature.replace(f"({receiver}", "(")
    kind = "class" if isinstance(value, type) else "function"
    return Document(package, name, kind, signature, getattr(value, "__doc__", None) or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CORPUS)
    parser.add_argument("--packages", default=",".join(SAMPLE), help="top-level packages (%(default)s), or all")
    parser.add_argument("--without", help="leave these out, separated by commas")
    parser.add_argument("--site", type=Path, action="append", help="a folder of packages, instead of this Python's")
    parser.add_argument("--limit", type=int, help="so many documents, spread evenly over all")
    given = parser.parse_args()
    packages = () if given.packages == "all" else given.packages.split(",")
    without = given.without.split(",") if given.without else ()
    table = read(packages=packages, without=without, sites=given.site, limit=given.limit)
    write(given.out, table)
    print(f"wrote {given.out}: {table.num_rows:,} docstrings of {len(table['package'].unique())} packages")


if __name__ == "__main__":
    main()
