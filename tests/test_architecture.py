"""Imports point one way, app.method ← lightning_modules, datamodules, callbacks ← app; files stay short."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "lightning_modules", "datamodules", "callbacks")
MIDDLE = ("lightning_modules", "datamodules", "callbacks")
# what the middle packages stand on
FOUNDATION = ("app.method", "app.core")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, path: Path) -> set[str]:
    """Every module that `source` imports, at any depth; `from a import b` counts as `a.b`."""
    package = list(path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(source: str, path: Path) -> set[str]:
    """The imports of `source` that its place in the tree forbids."""
    name, modules = module_name(path), imported_modules(source, path)
    if is_within(name, ("app.method",)):
        allowed = (*sys.stdlib_module_names, "torch", "app.method")
        return {module for module in modules if not is_within(module, allowed)}
    if is_within(name, MIDDLE):
        allowed = (name.split(".")[0], *FOUNDATION)
    elif is_within(name, FOUNDATION):
        allowed = FOUNDATION
    else:
        return set()  # app.main and app.commands put everything together
    return {module for module in modules if is_within(module, PACKAGES) and not is_within(module, allowed)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == set()


def test_no_module_imports_itself_through_others() -> None:
    imports = {module_name(path): imported_modules(path.read_text(encoding="utf-8"), path) for path in SOURCES}
    graph = {
        name: imports.keys() & (found | {one.rpartition(".")[0] for one in found}) - {name}
        for name, found in imports.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_private_parts_of_torch_and_others_are_in_one_file() -> None:
    users = {
        module_name(path)
        for path in SOURCES
        if any("._" in module for module in imported_modules(path.read_text(encoding="utf-8"), path))
    }
    assert users == {"lightning_modules.private"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_sources_are_found() -> None:
    assert "app.method.step" in {module_name(path) for path in SOURCES}


@pytest.mark.parametrize(
    ("file", "statement", "forbidden"),
    [
        ("app/method/dynamic_beta.py", "import lightning", "lightning"),
        ("app/method/dynamic_beta.py", "from app.core.errors import UserError", "app.core.errors.UserError"),
        ("app/method/dynamic_beta.py", "def f():\n    import numpy.linalg", "numpy.linalg"),
        ("app/core/files.py", "from app.main import main", "app.main.main"),
        ("app/core/errors.py", "import callbacks", "callbacks"),
        ("callbacks/filter.py", "from lightning_modules.step import X", "lightning_modules.step.X"),
        ("callbacks/filter.py", "from app import main", "app.main"),
        ("datamodules/hh.py", "import callbacks.audit as a", "callbacks.audit"),
        ("lightning_modules/a/b.py", "from ...app.commands import export", "app.commands.export"),
        ("lightning_modules/a.py", "from datamodules import hh", "datamodules.hh"),
    ],
)
def test_the_rule_sees_a_violation(file: str, statement: str, forbidden: str) -> None:
    assert violations(statement, ROOT / file) == {forbidden}


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        (
            "app/method/dynamic_beta.py",
            "import math, torch.nn.functional as F\nfrom app.method.dynamic_beta import Moments",
        ),
        ("app/method/dynamic_beta.py", "from .moments import Moments\nfrom collections.abc import Sequence"),
        (
            "callbacks/filter.py",
            "import lightning\nfrom app.method import step\nfrom app.core.files import atomic_file",
        ),
        ("callbacks/filter.py", "from .audit import A\nfrom callbacks import audit"),
        ("app/main.py", "import callbacks, datamodules, lightning_modules, app.commands.export"),
    ],
)
def test_the_rule_lets_the_allowed_through(file: str, statement: str) -> None:
    assert violations(statement, ROOT / file) == set()
