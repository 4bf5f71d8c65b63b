"""Under what something is measured: date, machine, load, versions, and the allocator.

Needs nothing but the standard library, so that environments without kvcompress can import it.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

# glibc maps blocks above 32 MiB anew each time and faults in every page of them; a cache that is
# copied at each step then pays for the system, not for the copy
TUNED_MALLOC: Final = (
    "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=8589934592"
)
VARIABLE: Final = "GLIBC_TUNABLES"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def uses_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """From now on malloc keeps large blocks in this process: the effect of `TUNED_MALLOC`.

    Returns:
        Whether it does; False where the C library is not glibc.
    """
    if not uses_glibc():
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def malloc_words() -> str:
    if not uses_glibc():
        return "the system's"
    tuned = os.environ.get(VARIABLE) == TUNED_MALLOC
    return "glibc, thresholds raised" if tuned else "glibc, default"


def cpu_words() -> str:
    """Model name of the processor."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def frequency_mhz() -> float | None:
    """Mean clock of the cores now, None where the system does not tell."""
    lines = _read("/proc/cpuinfo").splitlines()
    found = [float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz")]
    return round(sum(found) / len(found), 1) if found else None


def memory_bytes(name: str = "MemTotal") -> int | None:
    """A line of /proc/meminfo, None where there is none."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def largest_cache_bytes() -> int | None:
    """The last level cache of the first core, None where the system does not tell."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [_read(str(path)).strip() for path in folder.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    found = [int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units and s[:-1].isdigit()]
    return max(found, default=None)


def load_average() -> tuple[float, ...]:
    """Of the last 1, 5 and 15 minutes; empty where the system does not tell."""
    try:
        return tuple(round(x, 2) for x in os.getloadavg())
    except OSError:
        return ()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, without packages that are not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def today() -> str:
    return datetime.date.today().isoformat()


def cores() -> int:
    """That this process may use."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own is not None else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
