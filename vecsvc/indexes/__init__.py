"""The kinds of index, read side: one protocol, one table, one module a kind, imported when asked for."""

from vecsvc.indexes.base import Index, kinds, load, params_dict, search_params

__all__ = ["Index", "kinds", "load", "params_dict", "search_params"]
