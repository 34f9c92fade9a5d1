"""System checks: what would keep wsgi-loop from starting, told by `manage.py check`."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error
from django.core.exceptions import ImproperlyConfigured

from .conf import get_options


def check_setting(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.E001: the `WSGI_LOOP` setting is not accepted."""
    try:
        get_options()
    except ImproperlyConfigured as exc:
        return [Error(str(exc), hint="See the README of wsgi-loop for the setting's keys.", id="wsgi_loop.E001")]
    return []
