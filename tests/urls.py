"""Empty: each test serves its own view, see `support.serve`."""

from typing import Any

urlpatterns: list[Any] = []
