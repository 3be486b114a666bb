"""The settings of a development server, and how they are written into its configuration.

Driven by `Cluster`. Pure: it makes text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardkit.core.errors import UsageError

Setting = str | int | float | bool

SETTINGS: Mapping[str, Setting] = {
    "wal_level": "logical",
    "max_wal_senders": 32,
    "max_replication_slots": 32,
    "max_logical_replication_workers": 24,
    "max_sync_workers_per_subscription": 4,
    "max_worker_processes": 40,
    "max_prepared_transactions": 64,
    "max_connections": 200,
    "wal_retrieve_retry_interval": "100ms",
    # A crash of the server loses nothing that it acknowledged: what was written is with the kernel. Only a crash
    # of the machine would, and the folder does not outlive that. The pages stay whole only with full_page_writes
    # (a SIGKILL can cut a write in two), and commits only with synchronous_commit: both are left on.
    "fsync": False,
    "shared_buffers": "64MB",
    # In the data directory, so a killed server leaves none of it in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %b %d ",
}
"""What a cluster has where it is not told otherwise."""

_SINCE: Mapping[int, Mapping[str, Setting]] = {18: {"max_active_replication_origins": 32}}
"""Settings that older servers do not know, by the first major version that does."""


def default_settings(major: int) -> dict[str, Setting]:
    """The settings for a server of this major version."""
    settings = dict(SETTINGS)
    for since, newer in _SINCE.items():
        if major >= since:
            settings.update(newer)
    return settings


def configuration(settings: Mapping[str, Setting]) -> str:
    """The lines of a configuration file. Raises `UsageError` for a name or value that a line cannot carry."""
    return "".join(_line(name, value) for name, value in settings.items())


def _line(name: str, value: Setting) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) or not text.isprintable():
        raise UsageError(
            f"{name!r} = {value!r} cannot be a setting of PostgreSQL.",
            hint="Give its name and its value as text.",
        )
    quoted = text.replace("\\", "\\\\").replace("'", "''")
    return f"{name} = '{quoted}'\n"


def list_item(value: str) -> str:
    """One item of a list-valued setting, quoted so that spaces and commas belong to it."""
    return '"' + value.replace('"', '""') + '"'
