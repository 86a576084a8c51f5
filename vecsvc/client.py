"""The Python client, sync and async: the service's questions as calls, its answers and errors as our types.

with Client("http://127.0.0.1:8080") as client:
    for hit in client.search(text="how do I list files?", k=5, include=["fields"]).results:
        print(hit.score, hit.id, hit.fields)
"""

from __future__ import annotations

import base64
import http.client
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import ArrayLike, NDArray

from vecsvc import errors
from vecsvc.encoders import DEFAULT
from vecsvc.encoders.base import Role
from vecsvc.errors import ConfigError, InvalidRequest, InvalidVector, ServiceError, VecsvcError
from vecsvc.schemas import JSON, ErrorAnswer
from vecsvc.schemas_embed import OPENAI_PATH, OpenAIAnswer
from vecsvc.tls import client_tls
from vecsvc.types import BatchAnswer, Id, Include, SearchAnswer, Vectors

T = TypeVar("T")
Cert: TypeAlias = str | tuple[str, str]  # PEM file of chain and private key, or of each

DEFAULT_TIMEOUT_S: Final = 30.0

_ERRORS: Final[dict[str, type[VecsvcError]]] = {
    cls.code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, VecsvcError)
}


class Embeddings(msgspec.Struct, frozen=True):
    """The vectors of n texts, in their order."""

    vectors: Vectors  # (n, dim)
    model: str  # the encoder that made them
    tokens: int  # of all texts together
    truncated: int  # how many of the texts were longer than the encoder reads, and were cut


def _body(values: Mapping[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(
            {name: value for name, value in values.items() if value is not None}, enc_hook=_plain
        )
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"a text has a lone surrogate at character {error.start}: send valid Unicode") from error


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, which ids and filters are often made of, as Python's own."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise InvalidRequest(f"{str(value)[:80]!r} is {type(value).__name__}, which JSON has no place for")


def _vector(vector: ArrayLike) -> dict[str, str]:
    """base64 is a third of the size of numbers in JSON, and exact."""
    row = _floats(vector, "vector")
    if row.ndim != 1:
        raise InvalidVector(f"vector must have one dimension, got shape {row.shape}; send many with search_batch")
    return _base64(row)


def _vectors(vectors: ArrayLike) -> list[dict[str, str]]:
    rows = _floats(vectors, "vectors")
    if rows.ndim != 2:
        raise InvalidVector(f"vectors must have shape (n, dim), got {rows.shape}; send one with search")
    return [_base64(row) for row in rows]


def _floats(values: ArrayLike, what: str) -> NDArray[Any]:
    try:
        return np.asarray(values, dtype="<f4")
    except (ValueError, TypeError) as error:
        raise InvalidVector(f"{what} must be numbers, got {str(values)[:80]!r}") from error


def _base64(row: NDArray[Any]) -> dict[str, str]:
    return {"base64": base64.b64encode(row.tobytes()).decode()}


def _path(index: str | None, tail: str) -> str:
    return f"/indexes/{quote(index, safe='')}{tail}" if index is not None else tail


def _decode(status: int, body: bytes, kind: type[T]) -> T:
    """The answer, or the error that the service raised, as the class it raised it as."""
    if status == 200:
        return msgspec.json.decode(body, type=kind)
    try:
        error = msgspec.json.decode(body, type=ErrorAnswer).error
    except msgspec.MsgspecError as malformed:
        raise ServiceError(f"HTTP {status}: {body[:200]!r}") from malformed
    kind_of_error = _ERRORS.get(error.code, ServiceError)
    if issubclass(kind_of_error, ServiceError) and error.retry_after_ms is not UNSET:
        raise kind_of_error(error.message, retry_after_s=error.retry_after_ms / 1e3)
    raise kind_of_error.told(error.message)


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key has characters that no key has; give the text that `vecsvc keys new` printed")
    return {"Authorization": f"Bearer {api_key}"}


def _tls(url: str, ca: str | None, cert: Cert | None) -> ssl.SSLContext | None:
    """None for a service without TLS."""
    scheme = urlsplit(url).scheme
    if scheme != "https":
        if ca is not None or cert is not None:
            raise ConfigError(f"ca and cert are for https://, the URL is {url!r}")
        return None
    chain, key = (cert, "") if isinstance(cert, str) else cert if cert is not None else ("", "")
    return client_tls(chain, key, ca if ca is not None else "")


def _question(
    text: str | None, vector: ArrayLike | None, id: Id | None, k: int, rest: Mapping[str, Any]
) -> dict[str, Any]:
    _check_texts([text] if text is not None else [])
    return {"text": text, "vector": None if vector is None else _vector(vector), "id": id, "k": k, **rest}


def _questions(
    texts: Sequence[str] | None, vectors: ArrayLike | None, k: int, rest: Mapping[str, Any]
) -> dict[str, Any]:
    _check_texts(texts if texts is not None else [])
    rows = None if vectors is None else _vectors(vectors)
    return {"texts": texts, "vectors": rows, "k": k, **rest}


def _texts(texts: Sequence[str], model: str, role: Role) -> dict[str, Any]:
    if isinstance(texts, str):
        raise InvalidRequest("texts must be a list of texts, got one text")
    _check_texts(texts)
    return {"input": list(texts), "model": model, "input_type": role, "encoding_format": "base64"}


def _check_texts(texts: Sequence[Any]) -> None:
    """JSON has no bytes: they would be sent in base64, and that be taken for the text."""
    for text in texts:
        if isinstance(text, bytes | bytearray | memoryview):
            raise InvalidRequest(f"a text must be a str, got {type(text).__name__}: decode it first")


def _embeddings(status: int, headers: Mapping[str, str], body: bytes) -> Embeddings:
    answer = _decode(status, body, OpenAIAnswer)
    rows = b"".join(base64.b64decode(str(one.embedding)) for one in answer.data)
    vectors = np.frombuffer(rows, dtype="<f4").astype(np.float32, copy=False).reshape(len(answer.data), -1)
    return Embeddings(vectors, answer.model, answer.usage.prompt_tokens, int(headers.get("x-truncated", 0)))


class Client:
    """One keep-alive connection; not for several threads at once.

    Every call raises the error that the service names (errors.py), ServiceError where it cannot be reached; its
    `retry_after_s` says when to ask again, where the service knows.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        ca: str | None = None,
        cert: Cert | None = None,
    ) -> None:
        """For https, `ca` is the PEM file of who signed the service's certificate, where the system does not know;
        `cert` is the client's own, where the service asks for one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a service; write http://host:port")
        tls = _tls(url, ca, cert)
        self._connection: http.client.HTTPConnection = (
            http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
            if tls is None
            else http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=tls)
        )
        self._headers = _headers(api_key)
        self._prefix = parts.path.rstrip("/")

    def search(
        self,
        *,
        text: str | None = None,
        vector: ArrayLike | None = None,
        id: Id | None = None,
        k: int = 10,
        index: str | None = None,
        filter: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        rerank: Mapping[str, Any] | None = None,
        timeout_ms: float | None = None,
        partial: bool | None = None,
        include: Sequence[Include] | None = None,
    ) -> SearchAnswer:
        """The k rows nearest to a text, a vector (dim,) or a row's id."""
        rest: dict[str, Any] = {"filter": filter, "params": params, "rerank": rerank}
        rest |= {"timeout_ms": timeout_ms, "partial": partial, "include": include}
        return self._call("POST", _path(index, "/search"), SearchAnswer, _question(text, vector, id, k, rest))

    def search_batch(
        self,
        *,
        texts: Sequence[str] | None = None,
        vectors: ArrayLike | None = None,
        k: int = 10,
        index: str | None = None,
        filter: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        rerank: Mapping[str, Any] | None = None,
        timeout_ms: float | None = None,
        partial: bool | None = None,
        include: Sequence[Include] | None = None,
    ) -> BatchAnswer:
        """The k rows nearest to each text, or to each of the vectors (n, dim)."""
        rest: dict[str, Any] = {"filter": filter, "params": params, "rerank": rerank}
        rest |= {"timeout_ms": timeout_ms, "partial": partial, "include": include}
        return self._call("POST", _path(index, "/search/batch"), BatchAnswer, _questions(texts, vectors, k, rest))

    def embed(self, texts: Sequence[str], *, model: str = DEFAULT, role: Role = "query") -> Embeddings:
        """The vectors that an encoder of the service makes of the texts; `model` is an index or the encoder's name."""
        return _embeddings(*self._ask("POST", OPENAI_PATH, _texts(texts, model, role)))

    def indexes(self) -> list[dict[str, Any]]:
        """What is served: name, version, kind, metric, dim, size, shards, fields, encoder."""
        listed: list[dict[str, Any]] = self._call("GET", "/indexes", dict[str, Any])["indexes"]
        return listed

    def ready(self) -> bool:
        try:
            self._call("GET", "/readyz", dict[str, Any])
        except ServiceError:
            return False
        return True

    def _call(self, method: str, path: str, kind: type[T], question: Mapping[str, Any] | None = None) -> T:
        status, _, data = self._ask(method, path, question)
        return _decode(status, data, kind)

    def _ask(self, method: str, path: str, question: Mapping[str, Any] | None) -> tuple[int, Mapping[str, str], bytes]:
        body = None if question is None else _body(question)
        headers = self._headers if body is None else {**self._headers, "Content-Type": JSON}
        try:
            try:
                self._connection.request(method, self._prefix + path, body, headers)
                response = self._connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                # The service closed the idle connection; a search may be asked twice.
                self._connection.close()
                self._connection.request(method, self._prefix + path, body, headers)
                response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServiceError(f"no answer from {self._connection.host}:{self._connection.port}: {error}") from error
        return response.status, {name.lower(): value for name, value in response.getheaders()}, data

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """Any number of calls at once, over a pool of connections. Raises what Client raises."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_connections: int = 100,
        api_key: str | None = None,
        ca: str | None = None,
        cert: Cert | None = None,
    ) -> None:
        """As Client, with at most `max_connections` at a time."""
        self._url = url.rstrip("/")
        self._headers = _headers(api_key)
        self._tls = _tls(url, ca, cert)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def search(
        self,
        *,
        text: str | None = None,
        vector: ArrayLike | None = None,
        id: Id | None = None,
        k: int = 10,
        index: str | None = None,
        **rest: Any,
    ) -> SearchAnswer:
        """As Client.search; `rest` are its other settings."""
        return await self._call("POST", _path(index, "/search"), SearchAnswer, _question(text, vector, id, k, rest))

    async def search_batch(
        self,
        *,
        texts: Sequence[str] | None = None,
        vectors: ArrayLike | None = None,
        k: int = 10,
        index: str | None = None,
        **rest: Any,
    ) -> BatchAnswer:
        """As Client.search_batch; `rest` are its other settings."""
        question = _questions(texts, vectors, k, rest)
        return await self._call("POST", _path(index, "/search/batch"), BatchAnswer, question)

    async def embed(self, texts: Sequence[str], *, model: str = DEFAULT, role: Role = "query") -> Embeddings:
        """As Client.embed."""
        return _embeddings(*await self._ask("POST", OPENAI_PATH, _texts(texts, model, role)))

    async def indexes(self) -> list[dict[str, Any]]:
        """As Client.indexes."""
        listed: list[dict[str, Any]] = (await self._call("GET", "/indexes", dict[str, Any]))["indexes"]
        return listed

    async def ready(self) -> bool:
        try:
            await self._call("GET", "/readyz", dict[str, Any])
        except ServiceError:
            return False
        return True

    async def _call(self, method: str, path: str, kind: type[T], question: Mapping[str, Any] | None = None) -> T:
        status, _, data = await self._ask(method, path, question)
        return _decode(status, data, kind)

    async def _ask(
        self, method: str, path: str, question: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        try:
            try:
                return await self._once(method, path, question)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
                if isinstance(error, aiohttp.ClientConnectorError):
                    raise
                # The service closed the idle connection; a search may be asked twice.
                return await self._once(method, path, question)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServiceError(f"no answer from {self._url}: {str(error) or type(error).__name__}") from error

    async def _once(
        self, method: str, path: str, question: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            tls = self._tls if self._tls is not None else True
            connector = aiohttp.TCPConnector(limit=self._max_connections, ssl=tls)
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        body = None if question is None else _body(question)
        headers = self._headers if body is None else {**self._headers, "Content-Type": JSON}
        async with self._session.request(method, self._url + path, data=body, headers=headers) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return response.status, found, await response.read()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
