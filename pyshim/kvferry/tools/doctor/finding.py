"""What a check has found, and what it means."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Finding:
    subject: str
    found: str
    meaning: str
    good: bool = True
    """False if something is missing that kvferry could use."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
