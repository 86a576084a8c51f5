"""Object stores and folders through one door: opened by their address, read and written whole files at a time.

An object appears whole when its upload ends, and a file of a folder by rename. What is conditional on an object's
state, pyarrow cannot ask of S3: of two who write the same name, the last one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs

from vecsvc.errors import ConfigError, StorageError
from vecsvc.storage import delete_file, make_folder, new_file, rename, writing

# An endpoint that is not there fails after about 2 s, one that accepts and stays silent after about 16 s.
S3_CONNECT_TIMEOUT_S: Final = 2.0
S3_REQUEST_TIMEOUT_S: Final = 5.0
S3_WRITE_TIMEOUT_S: Final = 30.0  # a store may think for long before it says that it has all parts of a large file
S3_ATTEMPTS: Final = 3
CHUNK_BYTES: Final = 8 << 20  # of a file in memory at a time; on S3 it is what one request brings


def open_filesystem(source: str, what: str, *, request_timeout_s: float | None = None) -> tuple[Any, str]:
    """The filesystem of an address and the path in it: a local path, or s3://bucket/key.

    S3 is reached as the AWS_* environment says; ?region=, endpoint_override= and scheme= after the address win over
    it. `what` is what is looked for there, for messages. Raises ConfigError.
    """
    if not source.startswith("s3://"):
        if not source or "://" in source:
            raise ConfigError(f"{source!r}: {what} is a local path or s3://bucket/key")
        return pa.fs.LocalFileSystem(), str(Path(source).absolute())
    path, _, query = source.removeprefix("s3://").rpartition("?")
    options = dict(parse_qsl(query))
    if not path or not options or options.keys() - {"region", "endpoint_override", "scheme"}:
        path, options = source.removeprefix("s3://"), {}  # that was a ? of a glob
    bucket = path.partition("/")[0]
    if not bucket or "@" in bucket:
        raise ConfigError("an S3 address is s3://bucket/key; credentials come from AWS_ACCESS_KEY_ID and the like")
    # pyarrow reads credentials and profiles by itself, but neither the endpoint nor the certificates.
    environ = os.environ
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or ""
    endpoint = options.get("endpoint_override", endpoint)
    address = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    region = options.get("region") or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = pa.fs.resolve_s3_region(bucket)
    filesystem = pa.fs.S3FileSystem(
        region=region,
        endpoint_override=(address.netloc + address.path).rstrip("/") or None,
        scheme=options.get("scheme", address.scheme),
        tls_ca_file_path=environ.get("AWS_CA_BUNDLE") or None,
        connect_timeout=S3_CONNECT_TIMEOUT_S,
        request_timeout=S3_REQUEST_TIMEOUT_S if request_timeout_s is None else request_timeout_s,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        # Parts that are sent in the background are held in memory, however many they become.
        background_writes=False,
    )
    return filesystem, path.rstrip("/")


@dataclass(frozen=True, slots=True)
class Store:
    """A place in an object store or a folder. Paths are relative to it; errors are StorageErrors that name them."""

    _filesystem: Any
    _root: str
    _label: str  # the address as messages show it

    @classmethod
    def open(cls, address: str) -> Store:
        """Raises ConfigError, or StorageError where the store cannot even be asked for the region."""
        with _foreign_errors(address, "open"):
            filesystem, root = open_filesystem(address, "a store", request_timeout_s=S3_WRITE_TIMEOUT_S)
        label = f"s3://{root}" if filesystem.type_name == "s3" else root
        return cls(filesystem, root, label)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self._root.rpartition("/")[2]

    def at(self, path: str) -> Store:
        return Store(self._filesystem, f"{self._root}/{path}", f"{self._label}/{path}")

    def label(self, path: str = "") -> str:
        return f"{self._label}/{path}" if path else self._label

    def read(self, path: str, most: int) -> bytes | None:
        """A small file; None where there is none. One with more than `most` bytes is refused."""
        with _foreign_errors(self.label(path), "read"):
            try:
                with self._filesystem.open_input_stream(f"{self._root}/{path}", compression=None) as stream:
                    data: bytes = stream.read(most + 1)
            except FileNotFoundError:
                return None
        if len(data) > most:
            raise StorageError(f"cannot read {self.label(path)}: it has more than {most} bytes, which it should not")
        return data

    def fetch(self, path: str, target: Path, size: int, going_on: Callable[[], None]) -> str:
        """Copy a file of `size` bytes into a new file, synced; returns the sha256 of what came.

        No more than size + 1 bytes are taken. `going_on` is called with every chunk, and ends it by raising.
        """
        digest, left = hashlib.sha256(), size + 1
        with (
            _foreign_errors(self.label(path), "read"),
            self._filesystem.open_input_stream(f"{self._root}/{path}", compression=None) as stream,
            new_file(target) as file,
        ):
            while left:
                with _foreign_errors(self.label(path), "read"):
                    chunk = stream.read(min(CHUNK_BYTES, left))
                if not chunk:
                    break
                going_on()
                digest.update(chunk)
                left -= len(chunk)
                with writing(target):
                    file.write(chunk)
        return digest.hexdigest()

    def put(self, path: str, data: bytes) -> None:
        """A small file, in place of one that may be there."""
        with self._writer(path) as write:
            write(data)

    def put_file(self, path: str, source: Path, size: int, sha256: str) -> None:
        """A file of a version, in place of one that may be there. Raises StorageError where it is not what was said."""
        digest, sent = hashlib.sha256(), 0
        with self._writer(path) as write, source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                sent += len(chunk)
                write(chunk)
            # In a folder what was there before stays then; an object has been replaced.
            if (sent, digest.hexdigest()) != (size, sha256):
                raise StorageError(f"{source} is not what its manifest says: it was changed or damaged")

    @contextlib.contextmanager
    def _writer(self, path: str) -> Iterator[Callable[[bytes], object]]:
        if self._filesystem.type_name != "s3":
            target = Path(self._root, path)
            make_folder(target.parent)
            aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            delete_file(aside)
            with new_file(aside) as file:
                yield file.write
            rename(aside, target)
            return
        with (
            _foreign_errors(self.label(path), "write"),
            # Its end sends what there is, also after an error: so what was sent is compared before anything names it.
            self._filesystem.open_output_stream(f"{self._root}/{path}", compression=None) as stream,
        ):
            yield stream.write

    def sizes(self, path: str = "") -> dict[str, int]:
        """Every file below a path, by its path relative to there."""
        return {name: size for name, size in self._list(path, recursive=True).items() if size is not None}

    def names(self, path: str = "") -> list[str]:
        """What lies right below a path: files and folders."""
        return sorted(self._list(path, recursive=False))

    def folders(self) -> list[str]:
        return sorted(name for name, size in self._list("", recursive=False).items() if size is None)

    def _list(self, path: str, *, recursive: bool) -> dict[str, int | None]:
        base = f"{self._root}/{path}".rstrip("/")
        with _foreign_errors(self.label(path), "list"):
            selector = pa.fs.FileSelector(base, allow_not_found=True, recursive=recursive)
            found = self._filesystem.get_file_info(selector)
        return {info.path[len(base) + 1 :]: info.size if info.is_file else None for info in found}

    def delete(self, path: str) -> None:
        with _foreign_errors(self.label(path), "delete"), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._root}/{path}")


@contextlib.contextmanager
def _foreign_errors(label: str, verb: str) -> Iterator[None]:
    """The border where Arrow's and the system's errors become ours."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:400]
        remedy = "check that it is there and may be used"
        if "AWS Error" in text:
            remedy = "check the address, AWS_ENDPOINT_URL, AWS_REGION and the credentials"
        raise StorageError(f"cannot {verb} {label}: {text}; {remedy}") from error
