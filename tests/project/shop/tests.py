"""With unittest: `manage.py test`."""

from urllib.request import urlopen

from django.contrib.auth.models import User
from django.test import TestCase

from wsgi_loop.testing import Client, LiveServerTestCase, record_loop_calls


class ClientTests(TestCase):
    client_class = Client

    def test_customers(self):
        User.objects.create(username="ada")
        with record_loop_calls() as calls:
            assert self.client.get("/customers/").content == b"1"
        calls.assert_one_loop()

    def test_receipt(self):
        with record_loop_calls() as calls:
            assert b"".join(self.client.get("/receipt/")) == b"1\n2\n3\n"
        calls.assert_one_loop()


class LiveServerTests(LiveServerTestCase):
    def test_customers(self):
        User.objects.create(username="ada")
        with record_loop_calls() as calls, urlopen(self.live_server_url + "/customers/") as response:
            assert response.read() == b"1"
        calls.assert_one_loop()
