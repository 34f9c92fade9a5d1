"""docs/contributing/private-names.md has all that is used of asgiref, asyncio, CPython and Django without a promise."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from asgiref.current_thread_executor import CurrentThreadExecutor

import wsgi_loop
from wsgi_loop.bridge import shape
from wsgi_loop.bridge.executor import Executor

PACKAGE = Path(wsgi_loop.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
PAGE = PACKAGE.parent / "docs" / "contributing" / "private-names.md"
PRIVATE = re.compile(r"_[a-z]\w*")
#: Their underscore is there for another reason: Django and Python document them. (One is the end of `cr_frame`.)
DOCUMENTED = {"_default_manager", "_fields", "_frame", "_meta"}


class Row(NamedTuple):
    names: list[str]
    owner: str
    modules: list[str]
    purpose: str
    remedy: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            names, owner, modules, purpose, remedy = cells
            found.append(Row(re.findall("`(.+?)`", names), owner, re.findall("`(.+?)`", modules), purpose, remedy))
    return found


NAMES = [name for row in rows() for name in row.names]


def overridden() -> set[str]:
    """Private names of other people's classes that a subclass here has too."""
    loop = asyncio.SelectorEventLoop()
    loop.close()
    theirs = set(dir(loop)) & set().union(*used_and_own(SOURCES["event_loop.py"]))
    theirs |= set(vars(Executor)) & set(dir(CurrentThreadExecutor(None)))
    return {name for name in theirs if PRIVATE.fullmatch(name)}


def used_and_own(source: str) -> tuple[set[str], set[str]]:
    """Return the private names that a module uses, and those that it makes."""
    used, own = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name("self" | "cls"), name, ast.Store()):
                own.add(name)
            case ast.Attribute(_, name) | ast.Constant(str(name)) | ast.alias(name):
                used.add(name)
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                own.add(name)
            case _:
                pass
    return {name for name in used if PRIVATE.fullmatch(name)}, own


USED = {module: used_and_own(source)[0] for module, source in SOURCES.items()}
OWN = set[str]().union(*(used_and_own(source)[1] for source in SOURCES.values()))


def found_in_code() -> set[str]:
    foreign = set[str]().union(*USED.values()) - OWN - DOCUMENTED
    return {name for name in foreign if not name.startswith("_wsgi_loop_")} | overridden()


def test_each_private_name_in_the_code_is_in_the_table() -> None:
    assert found_in_code() - set(NAMES) == set()


def test_what_is_looked_for_is_found() -> None:
    source = "from a import _b\nc._d._e\ngetattr(f, '_g')\nself._own = 1\nself._own.h\n_i = _j\ndef _k(): ...\n_k()"
    used, own = used_and_own(source)
    assert used - own == {"_b", "_d", "_e", "_g"}
    assert {"_ready", "_must_cancel", "_selector", "_work_items", "_middleware_chain"} <= found_in_code()


def test_each_name_that_is_looked_at_in_asgiref_is_in_the_table() -> None:
    known = {".".join(name.split(".")[1:]) for name in shape.USED}
    assert known == {name for row in rows() if row.owner == "asgiref" for name in row.names if "." in name}


def test_no_name_is_there_twice() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.names[0])
def test_each_name_in_the_table_is_used_where_it_says(row: Row) -> None:
    assert row.owner in ("asgiref", "asyncio", "CPython", "Django")
    assert row.purpose
    assert row.remedy
    assert row.modules
    for name in row.names:
        [named] = [named for known, named in shape.USED.items() if known.endswith(f".{name}")] or [()]
        words: set[Any] = {name, *name.split("."), *named} - {"__call__", "__init__"}
        for module in row.modules:
            assert any(re.search(rf"\b{re.escape(word)}\b", SOURCES[module]) for word in words), (name, module)
        if name in found_in_code() - overridden():
            assert {module for module in SOURCES if name in USED[module]} == set(row.modules)
