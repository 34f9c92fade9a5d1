"""With the client of Django REST framework."""

from django.contrib.auth.models import User
from rest_framework.test import APIClient, APITestCase

from wsgi_loop.testing import ClientMixin, record_loop_calls


class Client(ClientMixin, APIClient):
    pass


class APITests(APITestCase):
    client_class = Client

    def test_pay(self):
        self.client.force_authenticate(User(username="ada"))
        with record_loop_calls() as calls:
            response = self.client.post("/api/pay/", {}, format="json")
        assert response.data == {"paid": 5, "by": "ada"}
        calls.assert_one_loop()
