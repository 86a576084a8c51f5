"""What a docstring says in plain words: markup, code and bookkeeping taken out, the length bounded.

Four ways of writing docstrings are known: plain prose, numpydoc's underlined sections, Google's `Args:` blocks and
Sphinx' `:param x:` lists. Prose is kept whole; lists of parameters and the like are kept in part, because their first
lines say what a thing works on; examples, references and notes on versions are dropped.
"""

from __future__ import annotations

import re
from itertools import pairwise

MAX_CHARS = 1_500  # of a text; encoders cut at some 256 tokens, which is fewer
MAX_TITLE_CHARS = 200
SECTION_CHARS = 300  # kept of one list of parameters, results or errors

_DROPPED = {
    "examples", "example", "references", "see also", "attributes", "methods", "usage", "versionadded", "todo",
    "versionchanged", "deprecated", "changelog", "doctest", "doctests",
}  # fmt: skip
_LISTS = {
    "parameters", "parameter", "args", "arguments", "keyword args", "keyword arguments", "other parameters", "returns",
    "return", "yields", "receives", "raises", "raise", "warns",
}  # fmt: skip
_EMPTY_HEADINGS = {"notes", "note", "description", "explanation", "overview", "synopsis", "summary", "details"}
_UNDERLINE = re.compile(r"^\s*([-=~^*#\"'`+])\1{2,}\s*$")
_GOOGLE = re.compile(r"^(\s*)([A-Z][A-Za-z ]{2,20}):\s*$")
_FIELD = re.compile(r"^(\s*)[:@](\w+)[^:`\n]*:(?:\s|$)")
_DIRECTIVE = re.compile(r"^(\s*)\.\.(\s|$)")
_ROLE = re.compile(r":(?:[A-Za-z][\w+.-]*:){1,2}(?=`)|:[A-Za-z][\w+.-]*:(?=`)")
_LINK = re.compile(r"`([^`<]*?)\s*<[^`>]*>`_{0,2}")
_ESCAPE = re.compile(r"\\([*_`| ])")
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)\s*(?:-{1,2}>.*)?$")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)\s+(?=\w|[\"'(\[])")
# `*args`, `~module.name` and single capitals in markup would otherwise stand out in plain words.
_QUOTED = re.compile(r"`{1,2}~?([^`\n]+?)`{1,2}_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])")


def plain_text(docstring: str) -> str:
    """The docstring, already cleaned of indentation, as one line of at most MAX_CHARS characters; may be empty."""
    lines = _without_examples(docstring.expandtabs().splitlines())
    # Functions in C repeat their signature before they say what they do; where that is all, it stays.
    if lines and _SIGNATURE.match(lines[0]) and any(line.strip() for line in lines[1:]):
        lines = lines[1:]
    return _cut(_one_line(_without_sections(lines)), MAX_CHARS)


def first_sentence(text: str) -> str:
    """Of a plain text, at most MAX_TITLE_CHARS characters."""
    return _cut(_SENTENCE_END.split(text, maxsplit=1)[0], MAX_TITLE_CHARS)


def _without_examples(lines: list[str]) -> list[str]:
    """Without doctests and what they print, which ends at the next empty line."""
    kept: list[str] = []
    inside = False
    for line in lines:
        stripped = line.strip()
        inside = stripped.startswith((">>>", "In [")) or (inside and bool(stripped))
        if not inside:
            kept.append(line)
    return kept


def _without_sections(lines: list[str]) -> list[str]:
    """Prose in its order; of each list its first SECTION_CHARS characters, of dropped sections nothing."""
    kept: list[str] = []
    room: int | None = None  # characters left to the section we are in; None in prose
    indent = -1  # what is indented more than this belongs to the section; -1 where only a heading ends it
    for line, below in pairwise([*lines, ""]):
        depth = len(line) - len(line.lstrip())
        if room is not None and indent >= 0 and line.strip() and depth <= indent:
            room = None
        if _UNDERLINE.match(line):
            continue
        if _UNDERLINE.match(below) and line.strip():
            name = line.strip().lower()
            room, indent = _room(name), -1
            if room is None:
                kept.append("" if name in _EMPTY_HEADINGS else line.rstrip(".: ") + ".")
            continue
        if (google := _GOOGLE.match(line)) and _room(google[2].lower()) is not None:
            room, indent = _room(google[2].lower()), len(google[1])
            continue
        if directive := _DIRECTIVE.match(line):
            room, indent = 0, len(directive[1])
        elif field := _FIELD.match(line):
            room, indent = (60 if field[2] in ("param", "return", "returns", "raises") else 0), len(field[1])
            line = line[field.end() :]
        if room is None:
            kept.append(line)
        elif room > 0:
            kept.append(line[:room].rsplit(" ", 1)[0] if len(line) > room else line)
            room -= len(line.strip()) + 1
    return kept


def _room(section: str) -> int | None:
    """Characters to keep of a section of this name; None where it is prose."""
    return 0 if section in _DROPPED else SECTION_CHARS if section in _LISTS else None


def _one_line(lines: list[str]) -> str:
    text = "\n".join(lines)
    text = _ESCAPE.sub(r"\1", _LINK.sub(r"\1", _ROLE.sub("", text)))
    text = _EMPHASIS.sub(r"\1", _QUOTED.sub(r"\1", text)).replace("::", ":").replace("``", "")
    return " ".join(text.split()).strip(" :")


def _cut(text: str, chars: int) -> str:
    """At most so many characters, at the end of a word; text that is no valid Unicode loses what is not."""
    text = text.encode("utf-8", "ignore").decode()
    return text if len(text) <= chars else text[:chars].rsplit(" ", 1)[0].rstrip(",;:")
