"""The encoders that serve: each opened once, however many indexes and versions use it, and closed after the last."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from vecsvc.batcher import BatchSettings
from vecsvc.config import ServeSettings
from vecsvc.encoder_keeper import EncoderKeeper
from vecsvc.encoders import encoder_path
from vecsvc.encoders.base import Encoder
from vecsvc.encoders.cellular import with_cells
from vecsvc.encoders.folder import find_model, hash_files, read_settings
from vecsvc.encoders.measure import RunChoice, open_fastest
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import ArtifactDamaged, EncoderError
from vecsvc.onnx_session import SessionSettings, device_name, find_provider
from vecsvc.query_encoder import QueryEncoder
from vecsvc.telemetry import Metrics
from vecsvc.types import Vectors

log: Final = logging.getLogger("vecsvc.encoder")

_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]  # name, and the files with their hashes

BULK_NICE: Final = 10  # of 19: a thread of bulk that shares a core with a query's gets a tenth of it
INLINE_DEVICE: Final = "cpu"  # a run on another device waits for it, which the event loop must not


class PooledEncoder(QueryEncoder):
    """An encoder that several indexes may share. Each user lets go of it with `release`."""

    def __init__(
        self,
        encoder: Encoder,
        choice: RunChoice,
        settings: ServeSettings,
        metrics: Metrics,
        hashes: Mapping[str, str],
    ) -> None:
        device = encoder_device(settings)
        batches = BatchSettings(
            run_s=settings.bulk_run_ms / 1e3,
            inline_s=settings.inline_ms / 1e3 if device == INLINE_DEVICE else 0.0,
            max_waiting_tokens=settings.max_waiting_tokens,
            workers=choice.instances,
            # Who says how many runs there may be gets no more; under a ceiling a second one might fail.
            beside_bulk=not (settings.encoder_instances or settings.encoder_memory_mb) and device == INLINE_DEVICE,
            # A run of several threads would wait for its one nice one.
            bulk_nice=BULK_NICE if device == INLINE_DEVICE and choice.threads == 1 else 0,
        )
        super().__init__(encoder, batches, settings.encoder_cache, metrics)
        self.hashes = hashes
        self.choice = choice
        self.folders: list[Path] = []  # one for each user; any of them holds the encoder's files
        self._settings = settings
        self._device = device
        try:
            golden = self.warm_up()
            if not np.isfinite(golden).all():
                raise EncoderError(f"encoder {self.spec.name!r} gives no finite vectors for the canary texts")
        except BaseException:
            self.close()
            raise
        self.golden: Vectors = golden
        self.keeper = EncoderKeeper(self.batcher, self._reopen, golden, settings.encoder_stall_s, self._replaced)

    def _replaced(self) -> None:
        self.forget()
        self._metrics.encoder_replaced(self.spec.name).inc()

    def close(self) -> None:
        if hasattr(self, "keeper"):
            self.keeper.close()
        super().close()

    def _reopen(self) -> Encoder:
        """The same encoder once more; its files are hashed before a native library sees them."""
        folder = self.folders[-1]
        found = hash_files(folder)
        for name in sorted(self.hashes.keys() | found.keys()):
            if found.get(name) != self.hashes.get(name):
                raise ArtifactDamaged(
                    f"{folder / name}: is not the file that the encoder was opened with",
                    remedy="put that back, or start the service again",
                )
        # As it was opened before: what is measured of a machine in trouble says little.
        return _open_with(
            folder, self.spec.name, self._settings, self.hashes, self.choice.threads, self.choice.spinning
        )


class EncoderPool:
    """Which encoders are open. One thread takes, any may release."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._open: dict[_Key, PooledEncoder] = {}
        self._lock = threading.Lock()

    def take(self, folder: Path, name: str) -> PooledEncoder:
        """The encoder in `folder`, opened unless one of the same files and name is. Raises as open_encoder does."""
        hashes = hash_files(folder)
        key = (name, tuple(sorted(hashes.items())))
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                found.folders.append(folder)
                return found
        encoder, choice = _open(folder, name, self._settings, hashes)
        opened = PooledEncoder(encoder, choice, self._settings, self._metrics, hashes)
        facts = {"encoder": name, **dataclasses.asdict(choice)}
        log.info("encoder opened", extra={"data": facts})
        with self._lock:
            opened.folders.append(folder)
            self._open[key] = opened
        return opened

    def release(self, encoder: PooledEncoder, folder: Path) -> None:
        """One user of `folder` needs the encoder no more."""
        with self._lock:
            encoder.folders.remove(folder)
            if encoder.folders:
                return
            self._open = {key: one for key, one in self._open.items() if one is not encoder}
        # The last user may be the event loop, and closing waits for the run under way.
        threading.Thread(target=encoder.close, name="vecsvc-encoder-close", daemon=True).start()

    def encoders(self) -> list[PooledEncoder]:
        with self._lock:
            return list(self._open.values())


def check_encoder(settings: ServeSettings) -> None:
    """Refuse what no look at a folder of indexes could mend. Raises UserError."""
    if settings.encoder:
        find_model(encoder_path(settings.encoder))
    SessionSettings(memory_mb=settings.encoder_memory_mb)
    if settings.encoder_provider:
        find_provider(settings.encoder_provider)


def encoder_device(settings: ServeSettings) -> str:
    """Where encoders run: a provider of their own, or the device of the service."""
    return device_name(settings.encoder_provider if settings.encoder_provider else settings.device)


def _open(folder: Path, name: str, settings: ServeSettings, hashes: Mapping[str, str]) -> tuple[Encoder, RunChoice]:
    """Opened as the settings say, and as a measurement does where they leave it open."""

    def open_with(threads: int, spinning: bool) -> Encoder:
        return _open_with(folder, name, settings, hashes, threads, spinning)

    spinning = None if settings.encoder_spinning == "auto" else settings.encoder_spinning == "on"
    if settings.encoder_threads == 0 and encoder_device(settings) == INLINE_DEVICE:
        # Two batches that texts join would share them, and each be half as full.
        joined = settings.encoder_batching == "cellular" and read_settings(folder).cells is not None
        instances = 1 if joined and settings.encoder_instances == 0 else settings.encoder_instances
        return open_fastest(open_with, instances=instances, spinning=spinning)
    choice = RunChoice(
        threads=settings.encoder_threads,
        spinning=spinning is True,
        instances=settings.encoder_instances if settings.encoder_instances else 1,
        why="encoder_threads is given" if settings.encoder_threads else f"{encoder_device(settings)} is not measured",
    )
    return open_with(choice.threads, choice.spinning), choice


def _open_with(
    folder: Path, name: str, settings: ServeSettings, hashes: Mapping[str, str], threads: int, spinning: bool
) -> Encoder:
    device, memory_mb = encoder_device(settings), settings.encoder_memory_mb
    encoder = open_encoder(
        folder,
        name=name,
        device=device,
        num_threads=threads,
        spinning=spinning,
        memory_mb=memory_mb,
        hashes=hashes,
    )
    if settings.encoder_batching != "cellular":
        return encoder
    cells = SessionSettings(device=device, num_threads=threads, spinning=spinning, memory_mb=memory_mb)
    return with_cells(encoder, folder, cells)
