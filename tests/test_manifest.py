"""Manifests are read as they were written, those of earlier builds too, and say what a vector takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpora import build, write_corpus

from vecsvc.errors import ArtifactUnfit
from vecsvc.manifest import FORMAT_VERSION, BytesPerVector, read_manifest, write_manifest
from vecsvc.seal import sealed, unsealed

GOLDEN = Path(__file__).parent / "golden"


def opened(file: Path, tmp_path: Path) -> Any:
    shutil.copy(file, tmp_path / "manifest.json")
    return read_manifest(tmp_path)


def test_every_format_that_is_read_has_a_golden_manifest() -> None:
    formats = [json.loads(file.read_bytes())["format_version"] for file in GOLDEN.glob("manifest-*.json")]
    assert set(formats) == {FORMAT_VERSION}


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("manifest-*.json")), ids=lambda file: file.stem)
def test_a_manifest_of_an_earlier_build_is_read_and_completed(file: Path, tmp_path: Path) -> None:
    manifest = opened(file, tmp_path)
    assert manifest.spec.size == 40 and len(manifest.shards) == 2 and manifest.created == "2026-01-02T03:04:05Z"
    sizes = [entry.size_bytes for entry in manifest.files() if entry.path.endswith("/vectors.npy")]
    assert manifest.bytes_per_vector.vectors == sum(sizes) / 40 and manifest.bytes_per_vector.index == 0


def test_a_field_that_is_newer_than_the_reader_is_refused_by_its_name(tmp_path: Path) -> None:
    document = unsealed((GOLDEN / "manifest-1.json").read_bytes())
    assert document is not None
    facts = json.loads(document) | {"from_the_future": 1}
    (tmp_path / "manifest.json").write_bytes(sealed(json.dumps(facts, indent=2).encode()))
    with pytest.raises(ArtifactUnfit, match="from_the_future"):
        read_manifest(tmp_path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = opened(GOLDEN / "manifest-1.json", tmp_path)
    (tmp_path / "again").mkdir()
    write_manifest(tmp_path / "again", manifest)
    assert read_manifest(tmp_path / "again") == manifest


@pytest.mark.parametrize("kind", ["exact", "kd_tree"])
def test_the_bytes_of_a_vector_add_up_to_those_of_all_files(kind: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=60, dim=16)
    version = build(corpus, tmp_path / "out", kind=kind, name="demo", version="v1", shards=2, fields="*")
    manifest = read_manifest(tmp_path / "out" / "demo" / "v1")
    each = manifest.bytes_per_vector
    assert isinstance(each, BytesPerVector), version
    assert json.loads((tmp_path / "out" / "demo" / "v1" / "manifest.json").read_bytes())["bytes_per_vector"]
    total = sum(entry.size_bytes for entry in manifest.files())
    assert abs(60 * (each.index + each.vectors + each.rest) - total) < 60 * 0.2
    assert 4 * 16 < each.vectors < 4 * 16 + 10 and each.rest > 24
    assert (each.index > 0) == (kind == "kd_tree")


@pytest.mark.parametrize("document", [b'{\n  "a": 1\n}', b"{\n}"])
def test_a_seal_breaks_with_any_byte(document: bytes) -> None:
    whole = sealed(document)
    assert unsealed(whole) == document
    for at in range(len(whole)):
        assert unsealed(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]) is None
    assert unsealed(whole[:-1]) is None and unsealed(whole + b"\n") is None and unsealed(b"") is None
