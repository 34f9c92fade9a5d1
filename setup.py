"""The description for a package index, where the links of README.md to other files have to be whole addresses.

All else is in setup.cfg.
"""

import re
from configparser import RawConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def description() -> str:
    configuration = RawConfigParser()
    configuration.read(HERE / "setup.cfg", encoding="utf-8")
    source = re.search(r"^Source = (.+)$", configuration["metadata"]["project_urls"], re.MULTILINE)
    version = re.search(r'^__version__ = "(.+)"$', (HERE / "wsgi_loop/__init__.py").read_text("utf-8"), re.MULTILINE)
    assert source
    assert version
    address, tag = source[1], f"v{version[1]}"

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith(".png") else "blob"
        return f"]({address}/{kind}/{tag}/{match[1]})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, (HERE / "README.md").read_text("utf-8"))


setup(long_description=description())
