"""The store: blocks and checkpoints are kept, and found again by the tokens they stand for."""

from .explanation import Explanation, Share
from .names import Listed
from .store import Found, Store
from .tracing import TraceSpan

__all__ = ["Explanation", "Found", "Listed", "Share", "Store", "TraceSpan"]
