"""Connects the receivers."""

from django.apps import AppConfig


class ExampleSiteConfig(AppConfig):
    name = "example_site"

    def ready(self) -> None:
        from . import receivers  # noqa: F401
