"""Enters vecsvc into ann-benchmarks: one class for every kind that has a breadth, nng by default.

Copied as ann_benchmarks/algorithms/vecsvc/module.py, beside config.yml and Dockerfile; see README.md.
"""

import os

import numpy as np

import index_builders
from vecsvc import indexes
from vecsvc.errors import UnknownKind

from ..base.module import BaseANN

METRICS = {"angular": "cosine", "euclidean": "l2"}


class Vecsvc(BaseANN):
    """`method_param`: kind (nng), setting (ef_search), and params, the build parameters of the kind."""

    def __init__(self, metric, method_param=None):
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not known; known are {', '.join(METRICS)}")
        given = {"kind": "nng", "setting": "ef_search", "params": {}, **(method_param or {})}
        unknown = set(given) - {"kind", "setting", "params"}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is not known; known are kind, setting and params")
        if given["kind"] not in indexes.kinds():
            raise UnknownKind(f"{given['kind']!r} is no kind of index; known are {', '.join(indexes.kinds())}")
        self._metric = METRICS[metric]
        self._kind, self._setting, self._build = given["kind"], given["setting"], given["params"]
        self._search = {}

    def fit(self, X):
        vectors = np.ascontiguousarray(X, dtype=np.float32)
        self._index = index_builders.build(vectors, kind=self._kind, metric=self._metric, params=self._build)
        self._params = indexes.search_params(self._kind)

    def set_query_arguments(self, value):
        """One value of the kind's search setting."""
        self._search = {self._setting: value}
        self._params = indexes.search_params(self._kind, **self._search)

    def query(self, q, n):
        queries = np.asarray(q, dtype=np.float32)[None]
        return _found(self._index.search(queries, n, self._params, num_threads=1).labels[0])

    def batch_query(self, X, n):
        queries = np.ascontiguousarray(X, dtype=np.float32)
        self._answer = self._index.search(queries, n, self._params, num_threads=os.cpu_count() or 1).labels

    def get_batch_results(self):
        return [_found(row) for row in self._answer]

    def get_additional(self):
        return {"kind": self._kind, **self._build, **self._search}

    def done(self):
        self._index.close()

    def __str__(self):
        settings = {**self._build, **self._search}
        return f"vecsvc-{self._kind}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def _found(labels):
    """Without the places that stayed empty: ann-benchmarks looks every label up."""
    return labels[labels >= 0]
