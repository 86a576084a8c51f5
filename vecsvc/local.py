"""One question to an index in a folder, without a server: what `vecsvc search` runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from vecsvc.catalog import Catalog
from vecsvc.config import ServeSettings
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError, InvalidRequest, NotReady
from vecsvc.onnx_session import usable_cores
from vecsvc.storage import index_folders
from vecsvc.telemetry import Metrics
from vecsvc.types import IdQuery, Query, SearchAnswer, SearchSettings, TextQuery, VectorQuery


def ask(
    directory: Path,
    *,
    index: str | None,
    text: str | None,
    row_id: str | None,
    vector: str | None,
    k: int,
    encoder: str | None,
) -> SearchAnswer:
    """Open, ask, close. Files are checked as a service checks them."""
    settings = ServeSettings(
        encoder=encoder or "",
        memory="mapped",
        encoder_threads=usable_cores(),  # for a single question, finding out what is best takes longer than it saves
    )
    if not 1 <= k <= settings.max_k:
        raise InvalidRequest(f"k must be between 1 and {settings.max_k}, got {k}")
    index_folders(directory)  # a folder without an index is the user's mistake, no service that is not ready
    catalog = Catalog(directory, settings)
    try:
        catalog.refresh()
        if not catalog.names():
            raise NotReady(catalog.problem())
        served = catalog.get(index)
        query = _query(text, row_id, vector, served.manifest.id_type)
        engine = Engine(catalog, settings, Metrics(), threads=1)
        try:
            wanted = SearchSettings(k=k, timeout_ms=settings.max_timeout_ms, include=frozenset(["fields"]))
            return asyncio.run(engine.search(index, query, wanted))
        finally:
            engine.close()
    finally:
        catalog.close()


def _query(text: str | None, row_id: str | None, vector: str | None, id_type: str) -> Query:
    if sum(given is not None for given in (text, row_id, vector)) != 1:
        raise ConfigError("give one of TEXT, --id and --vector")
    if text is not None:
        if not text.strip():
            raise ConfigError("TEXT is empty")
        return TextQuery([text])
    if row_id is not None:
        try:
            return IdQuery(int(row_id) if id_type == "int" else row_id)
        except ValueError as error:
            raise ConfigError(f"--id: the ids of this index are integers, got {row_id!r}") from error
    try:
        values = np.array([float(value) for value in (vector or "").split(",")], dtype=np.float32)
    except ValueError as error:
        raise ConfigError(f"--vector takes numbers separated by commas: {error}") from error
    return VectorQuery(values.reshape(1, -1))
