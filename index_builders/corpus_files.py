"""Finds the files of a corpus, local or on S3, and opens them so that memory stays bounded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from vecsvc.errors import CorpusUnreadable

# An endpoint that is not there fails after about 2 s, one that accepts and stays silent after about 16 s.
S3_CONNECT_TIMEOUT_S: Final = 2.0
S3_REQUEST_TIMEOUT_S: Final = 5.0
S3_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class CorpusFile:
    path: str  # as the filesystem knows it
    label: str  # as messages show it
    name: str  # relative to the corpus
    size: int
    mtime_ns: int | None
    first_row: int
    rows: int


def find_files(source: str) -> tuple[Any, str, list[Any]]:
    """The filesystem, the folder that names are relative to, and what is known of each file, by name."""
    with foreign_errors(source):
        filesystem, path = _filesystem(source)
        info = filesystem.get_file_info(path)
        if info.type == pa.fs.FileType.File:
            return filesystem, str(PurePosixPath(path).parent), [info]
        parts = PurePosixPath(path).parts
        if filesystem.type_name == "s3" and filesystem.get_file_info(parts[0]).type == pa.fs.FileType.NotFound:
            raise CorpusUnreadable(f"{source}: there is no bucket {parts[0]!r}; check the address")
        pattern: tuple[str, ...] = ("**", "*.parquet")
        fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        if info.type == pa.fs.FileType.Directory:
            fixed = len(parts)
        elif fixed < len(parts):
            pattern = parts[fixed:]
        else:
            raise CorpusUnreadable(f"{source}: there is no such file or folder; check the path")
        root = str(PurePosixPath(*parts[:fixed]))
        selector = pa.fs.FileSelector(root, allow_not_found=True, recursive=len(pattern) > 1 or pattern[0] == "**")
        found = [
            info
            for info in sorted(filesystem.get_file_info(selector), key=lambda info: info.path)
            if info.type == pa.fs.FileType.File and _matches(PurePosixPath(info.path).parts[fixed:], pattern)
        ]
    if not found:
        wanted = "no *.parquet file in" if fixed == len(parts) else "no file matches"
        raise CorpusUnreadable(f"{wanted} {source}: check the path")
    return filesystem, root, found


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path is what a glob means: `**` is any number of folders, and hidden names are named or not meant."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern if pattern[0] == "**" else pattern[1:])


def _filesystem(source: str) -> tuple[Any, str]:
    if not source.startswith("s3://"):
        if not source or "://" in source:
            raise CorpusUnreadable(f"{source!r}: a corpus is a local path or s3://bucket/key")
        return pa.fs.LocalFileSystem(), str(Path(source).absolute())
    path, _, query = source.removeprefix("s3://").rpartition("?")
    options = dict(parse_qsl(query))
    if not path or not options or options.keys() - {"region", "endpoint_override", "scheme"}:
        path, options = source.removeprefix("s3://"), {}  # that was a ? of a glob
    bucket = path.partition("/")[0]
    if not bucket or "@" in bucket:
        raise CorpusUnreadable("an S3 address is s3://bucket/key; credentials come from AWS_ACCESS_KEY_ID and the like")
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
        request_timeout=S3_REQUEST_TIMEOUT_S,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )
    return filesystem, path.rstrip("/")


def label_of(filesystem: Any, path: str) -> str:
    return f"s3://{path}" if filesystem.type_name == "s3" else path


def damaged(file: CorpusFile, rows: int) -> CorpusUnreadable:
    return CorpusUnreadable(f"{file.label} says that it has {file.rows} rows, and has {rows}: write it again")


@contextlib.contextmanager
def foreign_errors(label: str) -> Iterator[None]:
    """The border where Arrow's and the system's errors become ours."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:400]
        remedy = "check that it is there, may be read, and is a whole, unencrypted Parquet file"
        if "AWS Error" in text:
            remedy = "check the address, AWS_ENDPOINT_URL, AWS_REGION and the credentials"
        raise CorpusUnreadable(f"cannot read {label}: {text}; {remedy}") from error


@contextlib.contextmanager
def open_parquet(filesystem: Any, path: str, buffer_bytes: int = 1 << 20) -> Iterator[Any]:
    """An open Parquet file that is read through a buffer of so many bytes a column.

    pre_buffer, or no buffer at all, would bring whole column chunks into memory, and pyarrow's writer makes
    them a million rows long.
    """
    with foreign_errors(label_of(filesystem, path)), filesystem.open_input_file(path) as file:
        yield pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer_bytes, page_checksum_verification=True)
