"""What a job may cost its servers: how fast it deletes, how far standbys may lag behind, how much WAL is held back.

Stored with the job, and so the same for whoever resumes it, unless he says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit."""

    rows_per_second: float | None = None
    """Of a purge, in each transfer."""
    lag: int | None = None
    """Bytes that a physical standby of a shard may be behind while rows are deleted there."""
    wal_retained: int | None = None
    """Bytes of WAL that the source may have to keep for the copy; beyond that it is given up."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Limits:
        """Those among a job's options."""
        return cls(**{name: options.get(name) for name in cls.__slots__})

    def as_options(self) -> dict[str, Any]:
        """For `Catalog.create_job` and `Catalog.begin_job`."""
        return asdict(self)
