"""What a measurement was made on: the machine and the versions, and nothing that tells whose machine it is."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: The packages that a figure may depend on. Some are optional parts of the servers: their absence is told as well.
PACKAGES = (
    "Django",
    "asgiref",
    "wsgi-loop",
    "gunicorn",
    "gunicorn_h1c",
    "uvicorn",
    "httptools",
    "uvloop",
    "a2wsgi",
    "httpx",
    "redis",
    "psycopg",
)


def processor() -> str:
    """The processor's model, or its architecture where Linux does not tell a model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory() -> int | None:
    """The memory of the machine, in MB; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (ValueError, OSError):
        return None


def commit() -> str | None:
    """The commit that is checked out, marked where files differ from it; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, object]:
    """Return the machine's description, as it is stored with a run. Call it before the run: the load is of now."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mb": memory(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {package: installed(package) for package in PACKAGES},
        "commit": commit(),
    }


def file_name() -> str:
    """Return the name of the file for the results of this Python and Django, such as py311-django52.json."""
    python, django = ("".join(each.split(".")[:2]) for each in (platform.python_version(), version("Django")))
    return f"py{python}-django{django}.json"
