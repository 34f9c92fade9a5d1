"""The example's front page and the toolbar's panel in a real Chromium: rendered, clicked and photographed.

The pictures are kept where WSGI_LOOP_TEST_PICTURES says, if it says anything.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..servers.support import ROOT, copy_of_example, free_port, running, takes_connections

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

SIZES = {"wide": (1280, 800), "phone": (390, 800)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = "There is no Chromium. Install it with: apt-get install chromium, or: python -m playwright install chromium"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium: the one that Playwright has installed, or the machine's."""
    with playwright.sync_playwright() as tool:
        own = tool.chromium.executable_path
        found = own if os.path.exists(own) else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip(INSTALL)
        # Its sandbox does not work for root in a container. It sees no pages but these.
        browser = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example site with its database."""
    return copy_of_example(tmp_path_factory.mktemp("site"), environment)


def environment(directory: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(directory)]),
        "DJANGO_SETTINGS_MODULE": "tests.browser.toolbar_settings",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def served(directory: Path, application: str) -> Iterator[str]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "4", "--bind", address]
    output = directory.parent / f"output-{port}.txt"
    with running([*command, application], directory, output, environment(directory), lambda: takes_connections(port)):
        yield f"http://{address}"


@pytest.fixture(scope="module")
def site(example: Path) -> Iterator[str]:
    with served(example, "wsgi_loop.wsgi:application") as url:
        yield url


@pytest.fixture(scope="module")
def stock_site(example: Path) -> Iterator[str]:
    with served(example, "django.core.wsgi:get_wsgi_application()") as url:
        yield url


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of each width and each colour scheme, on which nothing may go wrong. `photograph` takes its picture."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    context.set_default_timeout(30_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    # The toolbar's pages have no icon of their own.
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    yield page
    context.close()
    assert wrong == []


def photograph(page: Any, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = Path(os.environ.get("WSGI_LOOP_TEST_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}-{request.node.callspec.id}.png"
    page.screenshot(path=picture, full_page=True, animations="disabled")
    assert picture.stat().st_size > 5000


def fits(page: Any) -> bool:
    """Whether nothing has to be scrolled to the side."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def open_panel(page: Any, url: str) -> Any:
    page.goto(url)
    page.locator("#djShowToolBarButton, #djHideToolBarButton").locator("visible=true").first.wait_for()
    if page.locator("#djShowToolBarButton").is_visible():
        page.click("#djShowToolBarButton")
    page.click("#djdt-LoopPanel a")
    panel = page.locator("#LoopPanel .wsgi-loop")
    panel.wait_for()
    # Its styles have come.
    page.wait_for_function(
        "getComputedStyle(document.querySelector('#djDebugRoot').shadowRoot?.querySelector('.wsgi-loop .wl-lanes') "
        "?? document.querySelector('.wsgi-loop .wl-lanes')).display === 'flex'"
    )
    return panel


def test_the_front_page(page: Any, site: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page.goto(f"{site}/")
    stock, ours = page.locator(".figures").all_inner_texts()
    # The request thread, and from the view's gather on a thread of the loop's own.
    assert ours.split() == ["1", "event", "loop", "2", "threads"]
    assert int(stock.split()[0]) >= 5
    assert page.locator("article.ours svg line").count() == 1
    assert page.locator("article.ours svg circle").count() == page.locator("article.stock svg circle").count() >= 15
    photograph(page, "front", request, tmp_path)
    assert fits(page)
    # What each step does can be read, and each side has its columns, however narrow the page is.
    for detail in page.locator(".lanes li span").all():
        assert detail.is_visible()
        assert detail.evaluate("span => span.scrollWidth <= span.clientWidth"), detail.inner_text()
    table = page.locator(".table")
    assert table.evaluate("table => table.scrollWidth <= table.clientWidth")
    assert table.locator("td.side i").first.is_visible()
    assert table.locator("td.side i").nth(1).is_visible()
    page.get_by_role("link", name="sync view", exact=True).click()
    page.wait_for_url("**/sync/")
    assert page.locator("nav [aria-current]").inner_text() == "sync view"
    assert page.locator("article.ours .figures").inner_text().split() == ["1", "event", "loop", "1", "thread"]
    photograph(page, "front-sync", request, tmp_path)


def test_the_panel(page: Any, site: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    panel = open_panel(page, f"{site}/toolbar/sync/")
    assert panel.locator(".wl-figures").inner_text().split()[3:8] == ["1", "event", "loop", "1", "thread"]
    assert panel.locator("svg line").count() == 1
    rows = panel.locator("ol li")
    assert rows.count() == panel.locator("svg circle").count() == 7
    assert "example_site/work.py" in rows.nth(1).inner_text()
    # Each row stands beside its dot, and inside of the page.
    for number in range(7):
        row, dot = rows.nth(number).bounding_box(), panel.locator("svg circle").nth(number).bounding_box()
        assert abs(row["y"] + row["height"] / 2 - dot["y"] - dot["height"] / 2) < 3
        assert row["x"] > dot["x"] + dot["width"]
        assert rows.nth(number).evaluate("row => row.scrollHeight <= row.clientHeight"), "it runs into the next one"
        assert row["x"] + row["width"] <= page.viewport_size["width"]
    photograph(page, "panel", request, tmp_path)
    page.click("#LoopPanel .djDebugClose")
    assert not panel.is_visible()


def test_the_panel_tells_djangos_own_handler(
    page: Any, stock_site: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    panel = open_panel(page, f"{stock_site}/toolbar/sync/")
    assert panel.locator("svg line").count() == 2
    assert "wsgi_loop.WSGIHandler" in panel.inner_text()
    photograph(page, "panel-stock", request, tmp_path)


def test_the_panel_names_left_over_tasks(page: Any, site: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    panel = open_panel(page, f"{site}/toolbar/leaky/")
    assert "forgotten (sleep)" in panel.inner_text()
    photograph(page, "panel-leaky", request, tmp_path)
