"""For tests: Django's test client and live server, serving requests as in production, and a recorder of loop calls."""

from .tools.testing import *  # noqa: F403
from .tools.testing import __all__ as __all__
