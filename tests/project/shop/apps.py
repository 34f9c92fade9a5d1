from django.apps import AppConfig
from django.core.signals import request_finished, request_started


async def count(**kwargs):
    pass


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        request_started.connect(count)
        request_finished.connect(count)
