"""What the tests of hostile clients share: requests by hand, and what is made of the bytes that come back."""

from __future__ import annotations

from typing import Any

from service import Reply

JSON_TYPE = "application/json"


def head(method: str = "POST", path: str = "/search", /, **headers: Any) -> bytes:
    named = {"Host": "x", "Connection": "close", **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode()


def parse(raw: bytes) -> Reply:
    """The first reply in what came back."""
    top, separator, body = raw.partition(b"\r\n\r\n")
    assert separator, raw
    line, *fields = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    return Reply(int(line.split()[1]), headers, body[: int(headers["content-length"])])


def assert_refused(reply: Reply, status: int, message: str) -> None:
    assert reply.status == status, reply
    assert message in reply.message
    assert len(reply.body) < 1000, "a message shows a value, it does not send it back whole"
