"""What a benchmark ran on, and the kernel's counters of memory and network."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .ways import CORES

MIB = 2**20
_HERE = Path(__file__).resolve().parent
_STATUS = Path("/proc/self/status")
_NETWORK = Path("/proc/net/dev")
_POLICY = "OMP_WAIT_POLICY"  # whether idle threads of operators spin for a while, as by default


def described() -> str:
    """The machine, the versions and the day, in a line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    waiting = os.environ.get(_POLICY)
    policy = f", {_POLICY}={waiting}" if waiting else ""
    today = datetime.date.today()
    return f"{_processor()}, {CORES} cores{policy}, {versions}, {today}{_revision()}"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _revision() -> str:
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", wraploop at {done.stdout.strip()}"


def load() -> float:
    """How many processes ran in the last minute, on average; NaN where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def resident_bytes() -> float:
    """How much of this process is in memory now; NaN where the kernel does not say."""
    return _memory("VmRSS")


def file_bytes() -> float:
    """How much of that is the contents of files, as libraries' code is; NaN as above."""
    return _memory("RssFile")


def peak_bytes() -> float:
    """The most of this process that was in memory since `forget_peak`; NaN as above."""
    return _memory("VmHWM")


def forget_peak() -> None:
    """Has `peak_bytes` begin from now."""
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> float:
    if not _STATUS.exists():
        return math.nan
    found = re.search(rf"{name}:\s*(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024.0 if found else math.nan


def loopback_bytes() -> float:
    """What has been sent over the loopback interface so far, headers included; NaN as above.

    By all processes of the machine: nothing else should be talking.
    """
    if not _NETWORK.exists():
        return math.nan
    line = next(
        text for text in _NETWORK.read_text().splitlines() if text.strip().startswith("lo:")
    )
    return float(line.split(":")[1].split()[8])
