"""What JSON questions say around their vectors, read once and remembered: clients send the same words again.

Of a question by its vector only the numbers are new. What stands around them (which fields there are, k, a filter) is
known by its bytes after the first time, so that all that is left to read is the numbers.
"""

from __future__ import annotations

from typing import Final

from vecsvc import json_vectors, schemas
from vecsvc.config import HttpSettings
from vecsvc.types import MAX_DIM, Query, SearchSettings, VectorQuery

MAX_FORM_BYTES: Final = 512  # longer ones are read anew each time
MAX_REMEMBERED: Final = 1024  # forms; past that all are forgotten and read anew


class Forms:
    """The forms that were seen, and the settings that they stand for."""

    def __init__(self, limits: HttpSettings) -> None:
        self._limits = limits
        self._known: dict[bytes, SearchSettings] = {}

    def parse(self, body: bytes) -> tuple[Query, SearchSettings]:
        """As `schemas.parse_search`, and raises what it does."""
        opens, closes = body.find(b"["), body.find(b"]") + 1
        if not 0 < opens < closes or opens + len(body) - closes > MAX_FORM_BYTES:
            return schemas.parse_search(body, self._limits)
        # The first bracket is where the form is cut, so that no two pairs of ends make the same one.
        form = body[: opens + 1] + body[closes:]
        settings = self._known.get(form)
        if settings is not None:
            row = json_vectors.vector(body[opens:closes])
            if row is not None and row.shape[1] <= MAX_DIM:
                return VectorQuery(row), settings
            return schemas.parse_search(body, self._limits)
        query, settings = schemas.parse_search(body, self._limits)
        if isinstance(query, VectorQuery) and _is_of_vector(body[:opens], body[closes:]):
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[form] = settings
        return query, settings


def _is_of_vector(before: bytes, behind: bytes) -> bool:
    """Whether what was cut out is the value of `vector`, and not part of a text or of some other field.

    It is where other values in its place are what the decoder then finds. Two of them, because one may be what stands
    in another place already.
    """
    return all(schemas.vector_text(b"".join((before, value, behind))) == value for value in (b"[0]", b"[1]"))
