"""The corpus of docstrings: public names, plain words, and no package that is run for being read."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def docstrings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DATA)
    return importlib.import_module("docstrings")


def plain(docstring: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(DATA)
    return str(importlib.import_module("docstring_text").plain_text(docstring))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages: one with a private module behind a public name, tests, and a trap for importers."""
    files = {
        "shop/__init__.py": 'raise SystemExit("imported")\nfrom ._impl import Basket, pay\nfrom . import _impl\n',
        "shop/_impl.py": (
            'class Basket:\n    """Holds what a customer wants to buy."""\n'
            "    def __init__(self, owner, *, limit=9): pass\n"
            '    def add(self, thing: "Thing", count: int = 1) -> None:\n'
            '        """Put a thing into the basket. Twice is fine."""\n'
            '    def _hide(self):\n        """Private, and long enough to be kept."""\n'
            'def pay(sum):\n    """Pay what the basket costs."""\n'
            'def internal():\n    """Reached by no public name at all."""\n'
        ),
        "shop/money.py": (
            '"""Sums of money, and what can be done with them."""\n'
            'def again():\n    """Pay what the basket costs."""\n'
            'def short():\n    """Too short."""\n'
        ),
        "shop/tests/test_shop.py": 'def test_it():\n    """A test that nobody wants to find."""\n',
        "broken.py": "def f(:\n",
        "latin.py": b'"""caf\xe9 without a declared encoding, no Python then."""\n',
        "_hidden.py": '"""A private module beside the packages."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_things_are_named_by_their_shortest_public_path_and_nothing_is_imported(
    docstrings: ModuleType, site: Path
) -> None:
    table = docstrings.read(without=["stdlib"], sites=[site])
    assert table["id"].to_pylist() == ["shop.Basket", "shop.Basket.add", "shop.money", "shop.money.again"]
    assert "shop" not in sys.modules
    basket, add, *_ = table.to_pylist()
    assert basket["signature"] == "(owner, *, limit=9)" and add["signature"] == "(thing, count=1)"
    assert add["title"] == "Put a thing into the basket."
    assert add["text"] == "shop.Basket.add: Put a thing into the basket. Twice is fine."
    assert set(table["package"].to_pylist()) == {"shop"}


def test_a_file_that_is_no_python_is_left_out(docstrings: ModuleType, site: Path) -> None:
    assert docstrings.read(packages=["broken", "latin"], sites=[site]).num_rows == 0


def test_the_standard_library_is_read_with_its_modules_in_c(docstrings: ModuleType) -> None:
    wanted = ["json", "os", "builtins", "datetime", "math", "numpy"]
    table = docstrings.read(packages=wanted, without=["numpy"])
    ids = set(table["id"].to_pylist())
    assert {"json.dumps", "os.listdir", "str.split", "math.sqrt", "datetime.datetime.fromisoformat"} <= ids
    assert set(table["package"].to_pylist()) == {"json", "os", "builtins", "datetime", "math"}
    assert len(ids) == table.num_rows
    assert all(len(text) <= 1_700 for text in table["text"].to_pylist())
    limited = docstrings.read(packages=["json", "math", "datetime", "builtins"], limit=50)
    assert limited.num_rows == 50 and len(set(limited["package"].to_pylist())) == 4


@pytest.mark.parametrize(
    ("docstring", "words"),
    [
        ("Adds.\n\n>>> add(1)\n2\n\nAnd more.", "Adds. And more."),
        ("f(x) -> y\n\nDoes :class:`~a.B` to ``x``.", "Does a.B to x."),
        ("Does it.\n\nSee Also\n--------\nother : this\n\nNotes\n-----\nSlow.", "Does it. Slow."),
        ("Does it.\n\n:param x: the thing\n:rtype: int", "Does it. the thing"),
        ("Does it.\n\nExamples:\n    it()\n    it()\n\nAfter.", "Does it. After."),
        ("Does it.\n\n.. versionadded:: 3.2\n   As of then.\n\nAfter.", "Does it. After."),
        ("Reads `the page <http://x>`_ with \\*args.", "Reads the page with *args."),
        ("", ""),
        ("f(x)", "f(x)"),
        ("lone \ud800 surrogate", "lone surrogate"),
    ],
)
def test_markup_and_bookkeeping_are_taken_out(docstring: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert " ".join(plain(docstring, monkeypatch).split()) == words


def test_a_long_docstring_ends_at_a_word_and_a_parameter_list_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    long = plain("word " * 2_000, monkeypatch)
    assert len(long) <= 1_500 and long.endswith("word")
    listed = plain("Does.\n\nParameters\n----------\n" + "x : int\n    A number.\n" * 200, monkeypatch)
    assert 100 < len(listed) < 350
