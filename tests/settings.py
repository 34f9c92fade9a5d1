"""The one settings module of the tests. Redis and PostgreSQL are found through environment variables: see services."""

import os
import tempfile

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
USE_TZ = True
STATIC_URL = "/static/"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "wsgi_loop",
]
# A file, which threads share as they share a server: in memory, each connection would be a database. One for each run.
DATABASE = os.path.join(tempfile.gettempdir(), f"wsgi-loop-tests-{os.getpid()}.sqlite3")
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATABASE, "TEST": {"NAME": DATABASE}}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
WSGI_APPLICATION = "wsgi_loop.wsgi.application"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
REDIS_URL = os.environ.get("WSGI_LOOP_TEST_REDIS_URL", "redis://127.0.0.1:6379/9")
POSTGRES_URL = os.environ.get("WSGI_LOOP_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
