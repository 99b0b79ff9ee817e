"""The store: blocks and checkpoints are kept, and found again by the tokens they stand for."""

from .store import Found, Listed, Store

__all__ = ["Found", "Listed", "Store"]
