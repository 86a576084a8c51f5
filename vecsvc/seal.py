"""The last line of a manifest is the digest of all that stands before it, so that one flipped bit in it is noticed."""

from __future__ import annotations

import hashlib
import re
from typing import Final

MAX_MANIFEST_BYTES: Final = 64 << 20  # what is longer is no manifest, and is not read

_HEAD: Final = b',\n  "manifest_sha256": "'
_SEAL: Final = re.compile(re.escape(_HEAD) + rb'([0-9a-f]{64})"\n}\n')
_SEAL_BYTES: Final = len(_HEAD) + 64 + len(b'"\n}\n')


def sealed(document: bytes) -> bytes:
    """An indented JSON object with its digest as the last member."""
    body = document.removesuffix(b"\n}")
    return body + _HEAD + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def unsealed(data: bytes) -> bytes | None:
    """The JSON object that was sealed; None where `data` is not what was written."""
    body, seal = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None or hashlib.sha256(body).hexdigest().encode() != seal[1]:
        return None
    return body + b"\n}"
