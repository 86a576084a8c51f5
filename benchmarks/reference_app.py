"""The least that any aiohttp service does: decode the same body, answer a constant of the same size.

With --index it also calls `Index.search`, and shows what a search costs between two requests instead of in a loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import uvloop
from aiohttp import web

from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.storage import IndexFolder


class Body(msgspec.Struct):
    vector: list[float]
    k: int = 10


async def run(size: int, body: str, folder: Path | None, ef_search: int) -> None:
    look: Callable[[np.ndarray], object] = lambda vector: None  # noqa: E731
    if folder is not None:
        index_folder = IndexFolder(folder)
        served = Served(index_folder, str(index_folder.current()), ServeSettings())
        index = served.shards[0].index
        params = indexes.search_params(index.spec.kind, ef_search=ef_search)
        look = lambda vector: index.search(vector[None], 10, params)  # noqa: E731
    decode = msgspec.json.Decoder(Body).decode
    answer = b"{" + b" " * (size - 2) + b"}"

    async def search_json(request: web.Request) -> web.Response:
        look(np.array(decode(await request.read()).vector, dtype=np.float32))
        return web.Response(body=answer, content_type="application/json")

    async def search_raw(request: web.Request) -> web.Response:
        look(np.frombuffer(await request.read(), dtype=np.float32))
        return web.Response(body=answer, content_type="application/json")

    async def ready(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_post("/search", search_raw if body == "raw" else search_json)
    app.router.add_get("/readyz", ready)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stderr.write(json.dumps({"message": "listening", "port": runner.addresses[0][1]}) + "\n")
    sys.stderr.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--size", type=int, required=True, help="bytes of the constant answer")
    arguments.add_argument("--body", choices=("json", "raw"), default="json", help="what a request holds")
    arguments.add_argument("--index", type=Path, help="search this index too, and throw the answer away")
    arguments.add_argument("--ef-search", type=int, default=64)
    given = arguments.parse_args()
    uvloop.run(run(given.size, given.body, given.index, given.ef_search))
