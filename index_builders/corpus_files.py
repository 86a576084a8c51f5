"""Finds the files of a corpus, local or on S3, and opens them so that memory stays bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from vecsvc.errors import ConfigError, CorpusUnreadable
from vecsvc.stores import open_filesystem


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
        filesystem, path = open_filesystem(source, "a corpus")
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


def label_of(filesystem: Any, path: str) -> str:
    return f"s3://{path}" if filesystem.type_name == "s3" else path


def damaged(file: CorpusFile, rows: int) -> CorpusUnreadable:
    return CorpusUnreadable(f"{file.label} says that it has {file.rows} rows, and has {rows}: write it again")


@contextlib.contextmanager
def foreign_errors(label: str) -> Iterator[None]:
    """The border where Arrow's and the system's errors become ours."""
    try:
        yield
    except ConfigError as error:
        raise CorpusUnreadable(str(error)) from error
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
