"""With the fixtures of the plugin, and with those of pytest-django, which `wsgi_loop_serve` in pytest.ini is about."""

from urllib.request import urlopen

import pytest
from django.contrib.auth.models import User

PATHS = pytest.mark.parametrize("path", ["/customers/", "/pay/", "/receipt/"])


@pytest.mark.django_db
@PATHS
def test_client(client, loop_calls, path):
    assert b"".join(client.get(path))
    loop_calls.assert_one_loop()


@PATHS
def test_live_server(live_server, loop_calls, path):
    with urlopen(live_server + path) as response:
        assert response.read()
    loop_calls.assert_one_loop()


def test_admin_client(admin_client, loop_calls):
    assert admin_client.get("/pay/").content == b"6"
    loop_calls.assert_one_loop()


@pytest.mark.django_db
@PATHS
def test_wsgi_loop_client(wsgi_loop_client, loop_calls, path):
    assert b"".join(wsgi_loop_client.get(path))
    loop_calls.assert_one_loop()


@PATHS
def test_wsgi_loop_live_server(wsgi_loop_live_server, loop_calls, path):
    with urlopen(wsgi_loop_live_server + path) as response:
        assert response.read()
    loop_calls.assert_one_loop()


@pytest.mark.django_db
def test_the_view_is_in_the_transaction_of_the_test(wsgi_loop_client):
    User.objects.create(username="ada")
    assert wsgi_loop_client.get("/customers/").content == b"1"


def test_the_live_server_sees_the_data_of_the_test(wsgi_loop_live_server):
    User.objects.create(username="ada")
    with urlopen(wsgi_loop_live_server.url + "/customers/") as response:
        assert response.read() == b"1"


def test_what_a_view_raises(wsgi_loop_client):
    with pytest.raises(LookupError):
        wsgi_loop_client.get("/broken/")
