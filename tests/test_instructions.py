"""Promise 2, in instructions: they tell the same on every machine, busy or not, where a clock does not."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from benchmarks import instructions

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("workload", "bound"), [("sync_bare", 1.06), ("sync_default", 1.02)])
def test_a_sync_request_executes_hardly_more_instructions_than_stock(
    workload: str, bound: float, record_property: Callable[[str, object], None]
) -> None:
    if reason := instructions.missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    counted = instructions.per_request(workload)
    stock = counted.pop("stock")
    assert counted.keys() == {"process", "request"}
    told = f"{workload}: stock {stock:,.0f} instructions a request" + "".join(
        f", {mode} {ours:,.0f} ({ours / stock:.4f} times)" for mode, ours in counted.items()
    )
    record_property("instructions", told)
    print(told)
    assert all(ours <= bound * stock for ours in counted.values()), f"{told}; at most {bound} times is promised"
