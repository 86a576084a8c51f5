"""Makes a new encoder folder whole or not at all: staged beside its place, checked, renamed into it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np

from index_builders.onnx_graph import import_onnx
from vecsvc.encoders.base import CANARY_TEXTS, EncoderSpec, Role, unit_length
from vecsvc.encoders.folder import TOKENIZER, find_model
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.errors import ConfigError, EncoderError, StorageError
from vecsvc.storage import (
    STAGING,
    Lease,
    copy_file,
    delete_folder,
    delete_unheld,
    make_folder,
    rename,
    replace_file,
    sync_folder,
)
from vecsvc.tokenizer import Tokens

SAME: Final = 1e-5  # vectors of unit length that are nowhere farther apart differ by rounding alone


@contextlib.contextmanager
def new_encoder_folder(out: Path) -> Iterator[Path]:
    """A staging folder to write into; it becomes `out` when the block ends well, and is deleted otherwise.

    What an earlier attempt at the same `out` left when it was killed goes first; a living one is left alone.
    Raises ConfigError where `out` exists.
    """
    refuse_existing(out)
    make_folder(out.parent)
    sweep(out)
    staging = out.with_name(f"{STAGING}{out.name}-{os.getpid()}")
    lease = None
    try:
        make_folder(staging)
        lease = Lease.take(staging, exclusive=True)
        if lease is None:
            raise StorageError(f"{staging}: another process took it; try again")
        yield staging
        for folder in sorted((f for f in staging.rglob("*") if f.is_dir()), reverse=True):
            sync_folder(folder)
        sync_folder(staging)
        refuse_existing(out)
        rename(staging, out)
    except BaseException:
        with contextlib.suppress(StorageError):
            delete_folder(staging)
        raise
    finally:
        if lease is not None:
            lease.release()


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists, and an encoder is never overwritten: choose another folder")


def sweep(out: Path) -> None:
    """Delete the staging folders of attempts at `out` that died; the kernel dropped their locks with them."""
    dead = re.compile(re.escape(f"{STAGING}{out.name}-") + "[0-9]+")
    for folder in sorted(out.parent.iterdir()):
        if not dead.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        delete_unheld(folder)


def copy_files(files: list[Path], source: Path, target: Path) -> None:
    """Copy each file to the same place in `target` that it has in `source`."""
    for file in files:
        place = target / file.relative_to(source)
        make_folder(place.parent)
        copy_file(file, place)


def write_json(file: Path, content: Any) -> None:
    make_folder(file.parent)
    replace_file(file, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def check_encoder(folder: Path, name: str, *, full: bool) -> EncoderSpec:
    """Refuse what onnx calls wrong, or what cannot encode a text as long as its settings allow.

    The full check infers every shape, which it cannot where others put operators of their own.
    """
    model = find_model(folder)
    checker = import_onnx().checker
    try:
        # By its path, so that files of weights beside the model are looked at, too.
        checker.check_model(str(model), full_check=full)
    except Exception as error:
        raise EncoderError(f"{model}: the model is not valid ONNX: {' '.join(str(error).split())[:400]}") from error
    encoder = open_encoder(folder, name=name)
    try:
        encoder.encode([""])
        for role in get_args(Role):
            if encoder.split(["a"], role)[0].truncated:
                raise EncoderError(
                    f"the prompt of a {role} fills max_tokens, {encoder.spec.max_tokens}, and nothing is read of the "
                    "text: allow more tokens, or shorten it"
                )
        check_belongs(encoder, folder)
        try:
            encoder.encode(["a b " * encoder.spec.max_tokens])
        except EncoderError as error:
            raise EncoderError(f"max_tokens {encoder.spec.max_tokens} is too long for the model: {error}") from error
    finally:
        encoder.close()
    return encoder.spec


def check_belongs(encoder: OnnxEncoder, folder: Path) -> None:
    """Refuse a tokenizer or weights that are not this encoder's, as far as that shows."""
    canaries = encoder.split(CANARY_TEXTS)
    vectors = unit_length(encoder.encode(CANARY_TEXTS))
    unlike = len({tuple(one.ids) for one in canaries}) > 1  # not where max_tokens leaves nothing of them
    if unlike and float(np.abs(vectors - vectors[0]).max()) < SAME:
        raise EncoderError(
            f"{find_model(folder)}: gives every text the same vector: its weights are not those of an encoder"
        )
    token, last = encoder.last_token()
    # A canary with another token in its middle: what ran with the one and fails with the other does not know it.
    ids = [*canaries[0].ids]
    ids[len(ids) // 2 : len(ids) // 2 + 1] = [last]
    try:
        encoder.run([Tokens(ids, [0] * len(ids))])
    except EncoderError as error:
        raise EncoderError(
            f"{folder / TOKENIZER}: token {token!r} has the number {last}, which the model does not know; take the "
            f"tokenizer that it was trained with: {error}"
        ) from error
