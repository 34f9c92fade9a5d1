"""Counts the functions that are entered while one request is served: how much of wsgi-loop stands in its way.

An entry is the call of a Python function, or a step of a coroutine or of a generator, on whichever thread. Knows no
handler and no workload.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

#: Requests that come first, and seconds in which what goes on after an answer comes to its end.
WARM_UP, QUIET = 3, 0.1


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    # With the separator at its end: wsgi_loop_more is another package.
    return str(Path(spec.origin).parent / "_").removesuffix("_")


def count(serve: Callable[[], object]) -> dict[str, int]:
    """Count for one warm request.

    To be called before anything was served: of a thread that runs already, the interpreter tells nothing.
    """
    entered: list[CodeType] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.append(frame.f_code)

    def serve_and_wait(requests: int) -> None:
        for _ in range(requests):
            serve()
        time.sleep(QUIET)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        serve_and_wait(WARM_UP)
        entered.clear()
        serve_and_wait(1)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    ours, theirs = _folder("wsgi_loop"), _folder("asgiref")
    of_ours = [code for code in entered if code.co_filename.startswith(ours)]
    return {
        "entries": len(of_ours),
        "functions": len(set(of_ours)),
        "modules": len({code.co_filename for code in of_ours}),
        "asgiref_entries": sum(code.co_filename.startswith(theirs) for code in entered),
    }
