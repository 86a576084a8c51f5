"""The routes that answer with vectors: OpenAI's /v1/embeddings and TEI's /embed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import numpy as np
from aiohttp import hdrs, web

from vecsvc.config import HttpSettings
from vecsvc.door import Door, Route
from vecsvc.encoders.base import EncoderSpec, unit_length
from vecsvc.errors import NotReady, TextTooLong, UnsupportedMediaType
from vecsvc.front_door import Backend
from vecsvc.schemas import JSON
from vecsvc.schemas_embed import (
    MODELS_PATH,
    OPENAI_PATH,
    TEI_PATH,
    EmbedRequest,
    check_encoder,
    encode_model,
    encode_models,
    encode_openai,
    encode_tei,
    parse_openai,
    parse_tei,
)
from vecsvc.telemetry import Metrics
from vecsvc.types import Embedded

# How many of the texts were cut; neither shape has a field for it.
TRUNCATED_HEADER: Final = "X-Truncated"
INLINE_VALUES: Final = 16_384  # longer answers are made in a thread


class EmbedRoutes:
    """What the routes share; `read` gets a request's body within a limit of bytes."""

    def __init__(
        self,
        engine: Backend,
        settings: HttpSettings,
        metrics: Metrics,
        read: Callable[[web.Request, int], Awaitable[bytes]],
        door: Door,
    ) -> None:
        self._engine, self._settings, self._metrics, self._read = engine, settings, metrics, read
        self._door = door

    def routes(self) -> list[Route]:
        return [
            Route("POST", OPENAI_PATH, "read", "many", self._openai),
            Route("GET", MODELS_PATH, "read", "none", self._models),
            Route("GET", f"{MODELS_PATH}/{{name}}", "read", "none", self._model),
            Route("POST", TEI_PATH, "read", "many", self._tei),
            Route("POST", f"/indexes/{{name}}{TEI_PATH}", "read", "many", self._tei),
        ]

    async def _openai(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        asked = parse_openai(await self._body(request), self._settings)
        self._door.owe(self._door.key(request), len(asked.texts))
        return await self._answer(asked, None, started, lambda made: encode_openai(made, as_base64=asked.base64))

    async def _models(self, request: web.Request) -> web.Response:
        return _json(encode_models(self._engine.catalog.models()))

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._engine.catalog.with_encoder(name)  # says what there is where this is none
        return _json(encode_model(name, self._engine.catalog.models()[name]))

    async def _tei(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        asked = parse_tei(await self._body(request), self._settings)
        self._door.owe(self._door.key(request), len(asked.texts))
        return await self._answer(asked, request.match_info.get("name"), started, encode_tei)

    async def _body(self, request: web.Request) -> bytes:
        if request.content_type != JSON:
            raise UnsupportedMediaType(
                f"Content-Type is {request.headers.get(hdrs.CONTENT_TYPE, '')[:80]!r}, expected {JSON}"
            )
        return await self._read(request, self._settings.max_body_bytes)

    async def _answer(
        self, asked: EmbedRequest, index: str | None, started: float, encode: Callable[[Embedded], bytes]
    ) -> web.Response:
        catalog = self._engine.catalog
        served = catalog.with_encoder(asked.model) if index is None else catalog.get(index)
        specs: list[EncoderSpec] = []

        def check(spec: EncoderSpec) -> None:
            if index is None and catalog.with_encoder(asked.model).name != served.name:
                raise NotReady(f"the index of model {asked.model!r} is just being replaced: ask again")
            check_encoder(asked, spec)
            specs.append(spec)

        asked_at = time.perf_counter()
        made = await self._engine.embed(
            served.name, asked.texts, role=asked.role, timeout_ms=self._settings.embed_timeout_ms, check=check
        )
        [spec] = specs
        made_at = time.perf_counter()
        if not asked.truncate and any(made.truncated):
            raise TextTooLong(
                f"inputs[{made.truncated.index(True)}] has more than the {spec.max_tokens} tokens that encoder "
                f"{spec.name!r} reads: send a shorter text, or truncate true"
            )
        if asked.normalize and not spec.normalize:
            made = msgspec.structs.replace(made, vectors=unit_length(made.vectors))
        body = await self._engine.in_thread(lambda: encode(made)) if made.vectors.size > INLINE_VALUES else encode(made)
        cut = int(np.count_nonzero(made.truncated))
        self._metrics.truncated(made.encoder).inc(cut)
        spans = {"read": asked_at - started, "embed": made_at - asked_at, "answer": time.perf_counter() - made_at}
        timing = ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in spans.items())
        content_type = f"{JSON}; charset=utf-8"
        headers = {"Content-Type": content_type, "Server-Timing": timing, TRUNCATED_HEADER: str(cut)}
        return web.Response(body=body, headers=headers)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, headers={"Content-Type": f"{JSON}; charset=utf-8"})
