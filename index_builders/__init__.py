"""Builds indexes offline: corpus in, published artifact out. The read side is `vecsvc`."""

from index_builders.base import build

__all__ = ["build"]
