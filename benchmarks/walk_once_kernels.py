"""The search of `nng` whose walk never restarts: compiled by machine_code, for tp_tree.py to set the product's beside.

It is the product's code with another constant, so that nothing else differs. numba reads a constant when it translates
the function; the copy has functions of its own, and a name of its own under which machine_code keeps what they become.
"""

from __future__ import annotations

import importlib.util

_spec = importlib.util.find_spec("vecsvc.indexes.nng_kernels")
assert _spec is not None and _spec.loader is not None
_copy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_copy)
assert _copy.ROUNDS > 1, "the walk never restarts as it is: there is nothing to compare"
_copy.ROUNDS = 1

nng_search = _copy.nng_search
