"""Notices that this process is a fork, to forget what is its parent's. Knows nothing of the rest.

Python tells of a fork that it makes itself. uWSGI forks its workers behind its back (unless it is given
`--py-call-osafterfork`), so whoever is about to use the parent's state has to `check`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

#: That of the process which what is kept belongs to.
pid = os.getpid()
_hooks: list[Callable[[], None]] = []


def in_child(hook: Callable[[], None]) -> Callable[[], None]:
    """Call `hook` in a forked child: a decorator."""
    _hooks.append(hook)
    return hook


def check() -> None:
    """Notice a fork that nobody has told of."""
    global pid
    if pid != (found := os.getpid()):
        pid = found
        for hook in _hooks:
            hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=check)
