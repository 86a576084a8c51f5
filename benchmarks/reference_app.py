"""The least that any aiohttp service does: decode the same body, answer a constant of the same size."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

import msgspec
import numpy as np
import uvloop
from aiohttp import web


class Body(msgspec.Struct):
    vector: list[float]
    k: int = 10


async def run(size: int) -> None:
    decode = msgspec.json.Decoder(Body).decode
    answer = b"{" + b" " * (size - 2) + b"}"

    async def search(request: web.Request) -> web.Response:
        body = decode(await request.read())
        np.array(body.vector, dtype=np.float32)
        return web.Response(body=answer, content_type="application/json")

    async def ready(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_post("/search", search)
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
    uvloop.run(run(arguments.parse_args().size))
