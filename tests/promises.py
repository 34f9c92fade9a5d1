"""The tests of what every scope and thread mode promises, for those modules that run them once more in another one."""

from __future__ import annotations

from typing import Any

from . import (
    test_closing,
    test_context,
    test_cycles,
    test_nested_calls,
    test_one_loop,
    test_responses,
    test_streaming,
    test_threads,
    test_tools,
)

MODULES = (
    test_one_loop,
    test_context,
    test_threads,
    test_closing,
    test_cycles,
    test_nested_calls,
    test_responses,
    test_streaming,
    test_tools,
)


def all_but(left_out: set[str]) -> dict[str, Any]:
    """Return the tests by their names, without those that are left out."""
    return {
        name: test
        for module in MODULES
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in left_out
    }
