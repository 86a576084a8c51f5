"""The questions that recall is measured with: as far from every row as rows are from each other."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builders import base, questions
from index_builders.certify import Certifier
from index_builders.questions import labels_of, moved_rows
from vecsvc import indexes
from vecsvc.distance import unit
from vecsvc.exact_search import ExactSearch
from vecsvc.ranking import recall
from vecsvc.types import MAX_ABS, Metric, Vectors

DIM = 24


def gaussian(n: int, seed: int, dim: int = DIM) -> Vectors:
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


def split(vectors: Vectors, shards: int) -> tuple[list[Vectors], list[NDArray[np.int64]]]:
    rows = [np.arange(number, len(vectors), shards) for number in range(shards)]
    return [np.ascontiguousarray(vectors[mine]) for mine in rows], rows


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_each_is_as_far_from_its_row_as_that_from_its_nearest(metric: Metric) -> None:
    corpus = gaussian(400, seed=1)
    straight = unit(corpus) if metric == "cosine" else corpus
    moved = moved_rows([corpus], [np.arange(400)], metric, 60, seed=5)
    assert moved.shape == (60, DIM) and moved.dtype == np.float32
    sampled = np.sort(np.random.default_rng(5).choice(400, size=60, replace=False))
    between = np.linalg.norm(straight[sampled][:, None] - straight[None], axis=2)
    between[np.arange(60), sampled] = np.inf
    away = np.linalg.norm(moved - straight[sampled], axis=1)
    assert away == pytest.approx(between.min(axis=1), rel=1e-3)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_shards_make_no_difference(metric: Metric) -> None:
    corpus = gaussian(300, seed=2)
    whole = moved_rows([corpus], [np.arange(300)], metric, 50, seed=3)
    parts, rows = split(corpus, 3)
    assert moved_rows(parts, rows, metric, 50, seed=3) == pytest.approx(whole, abs=1e-6)
    # A row that lives in two shards is not its own neighbour.
    twice = [*parts, parts[0][:40]], [*rows, rows[0][:40]]
    assert moved_rows(*twice, metric, 50, seed=3) == pytest.approx(whole, abs=1e-6)


def test_one_shard_of_several_asks_about_its_own_rows() -> None:
    corpus = gaussian(300, seed=2)
    parts, rows = split(corpus, 3)
    moved = moved_rows([parts[1]], [rows[1]], "l2", 500, seed=3)
    assert len(moved) == 100
    assert moved == pytest.approx(moved_rows([parts[1]], [np.arange(100)], "l2", 500, seed=3))
    assert labels_of(np.array([0, 1, 298, 299]), rows[1]).tolist() == [-1, 0, 99, -1]


def test_a_row_is_moved_past_its_duplicates() -> None:
    corpus = gaussian(200, seed=1)
    twice = np.repeat(corpus, 3, axis=0)
    for metric in ("l2", "cosine"):
        straight = unit(twice) if metric == "cosine" else twice
        moved = moved_rows([twice], [np.arange(600)], metric, 60, seed=5)
        sampled = np.sort(np.random.default_rng(5).choice(600, size=60, replace=False))
        between = np.linalg.norm(straight[sampled][:, None] - straight[None], axis=2)
        between[between < 1e-4] = np.inf
        away = np.linalg.norm(moved - straight[sampled], axis=1)
        assert away == pytest.approx(between.min(axis=1), rel=1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_no_question_is_without_a_direction(seed: int) -> None:
    """On a hexagon the difference of two corners may lead from a third one to the middle."""
    corners = np.array([[np.cos(a), np.sin(a)] for a in np.arange(6) * np.pi / 3], np.float32)
    assert moved_rows([corners], [np.arange(6)], "cosine", 6, seed=seed).any(axis=1).all()
    two = moved_rows([corners[:2]], [np.arange(2)], "cosine", 2, seed=seed)
    assert np.linalg.norm(two - corners[:2], axis=1) == pytest.approx(np.ones(2), abs=1e-3)


def test_what_cannot_be_moved_stays_where_it_is() -> None:
    same = np.ones((20, DIM), np.float32)
    assert (moved_rows([same], [np.arange(20)], "l2", 10, seed=1) == 1).all()
    large = np.full((20, DIM), MAX_ABS, np.float32)
    large[::2] = -MAX_ABS
    moved = moved_rows([large], [np.arange(20)], "l2", 10, seed=1)
    assert np.isfinite(moved).all() and np.abs(moved).max() <= MAX_ABS
    assert moved_rows([same[:1]], [np.arange(1)], "l2", 10, seed=1).shape == (0, DIM)


def test_of_a_large_corpus_only_a_part_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "COMPARED_ROWS", 100)
    monkeypatch.setattr(questions, "BLOCK_ROWS", 25)
    corpus = gaussian(1000, seed=4)
    rows = np.arange(1000)
    some = np.linalg.norm(moved_rows([corpus], [rows], "l2", 40, seed=6) - corpus[_sampled(40, 6)], axis=1)
    monkeypatch.undo()
    whole = np.linalg.norm(moved_rows([corpus], [rows], "l2", 40, seed=6) - corpus[_sampled(40, 6)], axis=1)
    assert (some >= whole - 1e-4).all() and 1.0 < np.median(some / whole) < 1.5


def _sampled(n: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).choice(1000, size=n, replace=False))


def test_a_certificate_promises_no_more_than_questions_from_elsewhere_find() -> None:
    """Rows of noise, which know no neighbours but those that the index linked them to."""
    corpus, asked = gaussian(6000, seed=8, dim=48), gaussian(400, seed=9, dim=48)
    index = base.build(corpus, kind="nng", metric="l2", params={"degree": 16}, num_threads=2, seed=1)
    certifier = Certifier([corpus], [np.arange(6000)], "l2", 256, seed=7)
    certifier.measure(0, index)
    certificate, _ = certifier.certificate(0.95)
    assert certificate is not None
    truth = ExactSearch(corpus, "l2").search(asked, 10)
    for point in certificate.points[:3]:
        params = indexes.search_params("nng", **point.params)
        found = recall(index.search(asked, 10, params).distances, truth.distances[:, 9]).mean()
        rows = index.search(corpus[:256], 11, params)
        own = ExactSearch(corpus, "l2").search(corpus[:256], 11)
        easy = recall(rows.distances[:, 1:], own.distances[:, 10]).mean()
        assert point.recall < found + 0.04, (point, found)
        assert point.recall < easy
    index.close()
