"""vecsvc: what reads an index and serves it. What builds one is the package `index_builders`."""

__version__ = "0.1.0"
