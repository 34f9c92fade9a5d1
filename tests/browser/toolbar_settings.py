"""Settings: the example site with django-debug-toolbar."""

from example_site.settings import *  # noqa: F403
from example_site.settings import INSTALLED_APPS as EXAMPLE_APPS
from example_site.settings import MIDDLEWARE as EXAMPLE_MIDDLEWARE

INSTALLED_APPS = [*EXAMPLE_APPS, "debug_toolbar"]
MIDDLEWARE = ["debug_toolbar.middleware.DebugToolbarMiddleware", *EXAMPLE_MIDDLEWARE]
ROOT_URLCONF = "tests.browser.toolbar_urls"
DEBUG_TOOLBAR_PANELS = [
    "debug_toolbar.panels.timer.TimerPanel",
    "debug_toolbar.panels.sql.SQLPanel",
    "wsgi_loop.panel.LoopPanel",
]
DEBUG_TOOLBAR_CONFIG = {"SHOW_TOOLBAR_CALLBACK": "tests.browser.toolbar_urls.always"}
