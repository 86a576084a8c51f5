"""The way in: what each route declares, and who is let through, decided by a request's head before its body is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from aiohttp import HttpVersion11, hdrs, web

from vecsvc.access import KEY_HEADER, Key, Keyring, Scope
from vecsvc.admission import Admission, Load
from vecsvc.errors import InvalidRequest

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A refused body up to here is read and dropped, which costs less than another connection; a larger one ends it.
DRAIN_BYTES: Final = 1 << 20
CHALLENGE: Final = 'Bearer realm="vecsvc"'
_KEY: Final = web.RequestKey("key", Key)


class Route(NamedTuple):
    """What an application answers. Nothing has a default, so that no route forgets to say who may call it."""

    method: str
    path: str
    scope: Scope
    load: Load
    handler: Handler


class Door:
    """Lets requests in or raises why not: a key that holds, its scope, a free place, its rate; in that order."""

    def __init__(self, keyring: Keyring | None, admission: Admission) -> None:
        """Without a keyring everybody may do everything."""
        self._keyring, self._admission = keyring, admission

    def admit(self, request: web.Request, route: Route) -> None:
        """Raises Unauthorized, Forbidden, Overloaded or RateLimited."""
        key = None
        if self._keyring is not None and route.scope != "open":
            key = self._keyring.admit(presented(request.headers), route.scope)
            request[_KEY] = key
        if route.load != "none":
            self._admission.check(route.load, request.content_length if request.body_exists else 0)
        self.take(key)

    def knock(self, mark: bytes | None, scope: Scope) -> Key | None:
        """The key with that digest, with the scope that is asked. Raises Unauthorized or Forbidden."""
        return self._keyring.admit_marked(mark, scope) if self._keyring is not None else None

    def take(self, key: Key | None) -> None:
        """Count one query of a key; RateLimited where it has none left."""
        if self._keyring is not None and key is not None:
            self._keyring.take(key)

    def give_back(self, key: Key | None) -> None:
        """The query that was just counted was not answered, and will be counted where it is."""
        if key is not None:
            key.owe(-1)

    def owe(self, key: Key | None, queries: int) -> None:
        """Tell how many queries or texts a request of a key turned out to hold; one was counted when it came.

        Raises InvalidRequest where they are more than the key may ever ask at once.
        """
        if key is None:
            return
        if key.rate_per_s is not None and queries > key.burst:
            raise InvalidRequest(
                f"{queries} queries or texts, and key {key.name!r} may ask {key.burst} at once: send fewer"
            )
        key.owe(queries - 1)

    def key(self, request: web.Request) -> Key | None:
        """The key that a request was let in with."""
        return request.get(_KEY)


def presented(headers: Mapping[str, str]) -> str | None:
    """The key that a head brings; where it has both headers, ours counts."""
    key = headers.get(KEY_HEADER)
    if key is not None:
        return key
    scheme, _, rest = headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else None


async def invite(request: web.Request) -> None:
    """Ask for the body of a client that waits to be asked; who is refused sends none."""
    if hdrs.EXPECT in request.headers and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


def leave_body(request: web.Request, response: web.StreamResponse) -> None:
    """What is left of a body is read and dropped, so that its connection stays, unless there is too much of it."""
    if request.content.is_eof():
        return
    length = request.content_length
    if length is None or length > DRAIN_BYTES or hdrs.EXPECT in request.headers:
        response.force_close()
