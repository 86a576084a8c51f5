"""One question to an index in a folder, without a server: what `vecsvc search` runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vecsvc import schemas
from vecsvc.catalog import Catalog
from vecsvc.config import ServeSettings
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError, EncoderError, NotReady, UnknownIndex
from vecsvc.onnx_session import usable_cores
from vecsvc.storage import index_folders
from vecsvc.telemetry import Metrics
from vecsvc.types import SearchAnswer


def ask(
    directory: Path, question: Mapping[str, Any], *, index: str | None = None, encoder: str | None = None
) -> SearchAnswer:
    """Open, ask, close. Files are checked as a service checks them, and those of other indexes are not looked at.

    `question` is what `POST /search` takes, and the answer has the stored fields. An `id` may be a text where the ids
    of the index are integers.
    """
    settings = ServeSettings(
        encoder=encoder or "",
        memory="mapped",
        encoder_threads=usable_cores(),  # for a single question, finding out what is best takes longer than it saves
    )
    catalog = Catalog(_folder(directory, index), settings)
    try:
        catalog.refresh()
        if not catalog.names():
            raise NotReady(catalog.problem())
        body = {"timeout_ms": settings.max_timeout_ms, "include": ["fields"], **question}
        if catalog.get(None).manifest.id_type == "int" and "id" in body:
            with contextlib.suppress(ValueError):
                body["id"] = int(body["id"])
        query, wanted = schemas.parse_search(msgspec.json.encode(body), settings)
        engine = Engine(catalog, settings, Metrics(), threads=1)
        try:
            return asyncio.run(engine.search(None, query, wanted))
        except EncoderError as error:  # a service tells its log why
            raise EncoderError(str(error.__cause__ or error)) from error
        finally:
            engine.close()
    finally:
        catalog.close()


def _folder(directory: Path, index: str | None) -> Path:
    """The folder of the index that is asked."""
    folders = {folder.name: folder.path for folder in index_folders(directory)}
    if index is None and len(folders) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one with --index: {', '.join(folders)}")
    if index is not None and index not in folders:
        raise UnknownIndex(f"{directory} holds no index {index!r}; there are: {', '.join(folders)}")
    return folders[index] if index is not None else next(iter(folders.values()))
