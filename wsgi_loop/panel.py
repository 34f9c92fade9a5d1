"""The panel for django-debug-toolbar: `DEBUG_TOOLBAR_PANELS = [..., "wsgi_loop.panel.LoopPanel"]`."""

from .tools.panel import LoopPanel

__all__ = ["LoopPanel"]
