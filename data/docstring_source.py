"""What Python source files document, each thing under its public name; nothing is imported or run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAX_SIGNATURE_CHARS = 120
MAX_HOPS = 8  # from module to module, on the way from a public name to its definition

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """A docstring as it was written, under the name by which its thing is reached."""

    package: str  # the first part of the name
    name: str
    kind: str  # module, class or function
    signature: str  # (a, b=1), or empty
    docstring: str


@dataclass(slots=True)
class Module:
    """What one source file defines, documents and imports."""

    name: str
    is_package: bool
    docstring: str = ""
    defined: dict[str, list[Document]] = field(default_factory=dict)  # each name's own document and its members'
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here -> module, name there
    stars: list[str] = field(default_factory=list)  # modules of which everything is imported
    exported: set[str] | None = None  # __all__, where it is written out


def parse(path: Path, parts: tuple[str, ...]) -> Module | None:
    """The module that the file is, `parts` being its path from the folder of packages; None where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    module = Module(name, is_package, ast.get_docstring(tree) or "")
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef | _Function):
            if not statement.name.startswith("_") and statement.name not in module.defined:
                module.defined[statement.name] = list(_of_definition(statement, statement.name))
        elif isinstance(statement, ast.ImportFrom):
            _note_import(module, statement)
        elif isinstance(statement, ast.Assign) and (names := _written_out(statement)) is not None:
            module.exported = names
    return module


def documents(modules: Iterable[Module]) -> Iterator[Document]:
    """Everything public that the modules document, by its shortest public name."""
    by_name = {module.name: module for module in modules}
    public: dict[tuple[str, str], str] = {}  # module and name of a definition -> the name to use

    def offer(place: tuple[str, str] | None, name: str) -> None:
        if place is None:
            return
        known = public.get(place)
        if known is None or (name.count("."), len(name), name) < (known.count("."), len(known), known):
            public[place] = name

    for module in by_name.values():
        if _is_private(module.name):
            continue
        for name in module.defined:
            offer((module.name, name), f"{module.name}.{name}")
        for name in _taken_up(module, by_name):
            place = _definition(module.name, name, by_name)
            # A module that is no package only imports what it uses, but for a private twin's names (decimal).
            if place is not None and (module.is_package or _is_private(place[0])):
                offer(place, f"{module.name}.{name}")
    for module in by_name.values():
        if module.docstring and not _is_private(module.name):
            yield Document(_top(module.name), module.name, "module", "", module.docstring)
    for (module_name, name), path in public.items():
        for document in by_name[module_name].defined[name]:
            yield document._replace(package=_top(path), name=path + document.name[len(name) :])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, with those that stand under its `if` and `try`."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, block, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


def _written_out(statement: ast.Assign) -> set[str] | None:
    """The names of an `__all__ = [...]`; None for any other assignment."""
    if [ast.unparse(target) for target in statement.targets] != ["__all__"]:
        return None
    if not isinstance(statement.value, ast.List | ast.Tuple):
        return None
    return {str(element.value) for element in statement.value.elts if isinstance(element, ast.Constant)}


def _of_definition(node: ast.ClassDef | _Function, name: str) -> Iterator[Document]:
    """A function's document; a class' and those of its public members."""
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, _Function):
        if not name.rpartition(".")[2].startswith("test_"):
            yield Document("", name, "function", _signature(node, is_method="." in name), docstring)
        return
    members = [member for member in node.body if isinstance(member, ast.ClassDef | _Function)]
    inits = [m for m in members if m.name == "__init__" and isinstance(m, _Function)]
    signature = _signature(inits[-1], is_method=True) if inits else ""
    yield Document("", name, "class", signature, docstring)
    for member in members:
        if not member.name.startswith("_"):
            yield from _of_definition(member, f"{name}.{member.name}")


def _signature(node: _Function, *, is_method: bool) -> str:
    arguments = node.args
    for group in (arguments.posonlyargs, arguments.args, arguments.kwonlyargs, [arguments.vararg], [arguments.kwarg]):
        for argument in group:
            if argument is not None:
                argument.annotation = None
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return ""
    text = ast.unparse(arguments)
    if is_method and "staticmethod" not in decorators:
        text = text.partition(", ")[2] if not text.startswith("*") else text
        text = text.removeprefix("/, ")
    text = f"({text})"
    return text if len(text) <= MAX_SIGNATURE_CHARS else text[: MAX_SIGNATURE_CHARS - 4].rsplit(",", 1)[0] + ", ...)"


def _note_import(module: Module, statement: ast.ImportFrom) -> None:
    source = statement.module or ""
    if statement.level:
        parts = module.name.split(".")
        around = parts[: len(parts) - statement.level + module.is_package]
        source = ".".join([*around, source] if source else around)
    for alias in statement.names:
        if alias.name == "*":
            module.stars.append(source)
        else:
            module.imported.setdefault(alias.asname or alias.name, (source, alias.name))


def _taken_up(module: Module, by_name: dict[str, Module]) -> list[str]:
    """The public names that a module has by import."""
    names = {*module.imported}
    for source in module.stars:
        names |= _offered(source, by_name)
    if module.exported is not None:
        names &= module.exported
    return sorted(name for name in names if not name.startswith("_"))


def _offered(source: str, by_name: dict[str, Module], hops: int = MAX_HOPS) -> set[str]:
    """What `from source import *` brings."""
    if (module := by_name.get(source)) is None or not hops:
        return set()
    if module.exported is not None:
        return module.exported
    return {*module.defined, *module.imported}.union(*(_offered(star, by_name, hops - 1) for star in module.stars))


def _definition(source: str, name: str, by_name: dict[str, Module], hops: int = MAX_HOPS) -> tuple[str, str] | None:
    """The module in which what `source` calls `name` is defined, and its name there; None where it is not ours."""
    if (module := by_name.get(source)) is None or not hops:
        return None
    if name in module.defined:
        return source, name
    if name in module.imported:
        return _definition(*module.imported[name], by_name, hops - 1)
    places = (_definition(star, name, by_name, hops - 1) for star in module.stars)
    return next((place for place in places if place is not None), None)


def _is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _top(name: str) -> str:
    return name.partition(".")[0]
