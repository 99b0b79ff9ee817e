"""The store: blocks and checkpoints are kept, and found again by the tokens they stand for."""

from .names import Listed
from .store import Found, Store
from .tracing import TraceSpan

__all__ = ["Found", "Listed", "Store", "TraceSpan"]
