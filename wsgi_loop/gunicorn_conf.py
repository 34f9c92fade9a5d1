"""gunicorn's configuration for scope "process": each worker starts its process loop before it takes requests.

    gunicorn -c python:wsgi_loop.gunicorn_conf mysite.wsgi

In a `gunicorn.conf.py` of your own: `from wsgi_loop.gunicorn_conf import *`. Or call `wsgi_loop.process.start()` in a
hook `post_worker_init` of your own. gunicorn's master imports this, and nothing else of wsgi-loop.
"""

from typing import Any

__all__ = ["post_worker_init"]


def post_worker_init(worker: Any) -> None:
    """Start the process loop. What `LIFESPAN` raises ends the worker, and by gunicorn's boot error the master."""
    # Not by the master: what is imported there is not loaded anew by its reload.
    from .process import start

    start()
