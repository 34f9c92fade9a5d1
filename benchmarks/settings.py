"""Django's settings of every workload and contender: which, it learns from the environment."""

import os

from . import workloads
from .contenders import CONTENDERS

WORKLOAD = workloads.WORKLOADS[os.environ["BENCHMARKS_WORKLOAD"]]
CONTENDER = CONTENDERS[os.environ["BENCHMARKS_CONTENDER"]]
RUN = os.environ["BENCHMARKS_RUN"]
SLOW_URL = os.environ.get("BENCHMARKS_SLOW_URL", "")

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "benchmarks.site"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
]
MIDDLEWARE = {
    "none": [],
    "default": [
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    "stack": ["benchmarks.site.async_middleware"] * 3,
}[WORKLOAD.middleware]

if WORKLOAD.database == "sqlite":
    _name = os.environ["BENCHMARKS_SQLITE"]
    _database: dict[str, object] = {"ENGINE": "django.db.backends.sqlite3", "NAME": _name, "TEST": {"NAME": _name}}
else:
    _database = workloads.postgres_settings(RUN)
if not CONTENDER.runs_asgi:
    _database["CONN_MAX_AGE"] = None
elif WORKLOAD.database == "postgresql":
    # Django's documentation: under ASGI no persistent connections, but the backend's pool.
    _database["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 16}}
DATABASES = {"default": _database}
#: Tables are made from the models.
MIGRATION_MODULES: dict[str, None] = {name.rsplit(".", 1)[1]: None for name in INSTALLED_APPS}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
