"""Print how large the project is, against the targets of its design: `make size`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("app", "lightning_modules", "datamodules", "callbacks", "benchmarks")
TARGETS = {"lines of source": 12_000, "import cycles": 0, "YAML files": 35, "pages of docs": 13}


def main() -> None:
    """Print one line per measure."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    tests = list((ROOT / "tests").rglob("*.py"))
    for package in PACKAGES:
        print(f"{package:<20}{lines((ROOT / package).rglob('*.py')):>8} lines")
    found = {
        "lines of source": lines(files),
        "files of source": len(files),
        "lines of tests": lines(tests),
        "import cycles": len(cycles(imports(files))),
        "YAML files": len(list((ROOT / "configs").rglob("*.yaml"))),
        "pages of docs": len(list((ROOT / "docs").rglob("*.md"))),
        "lines of README": lines([ROOT / "README.md"]),
    }
    for name, value in found.items():
        print(f"{name:<20}{value:>8}" + (f"   target {TARGETS[name]}" if name in TARGETS else ""))


def lines(files: Iterator[Path] | list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def imports(files: list[Path]) -> dict[str, set[str]]:
    """Return the project's modules that each module imports, those for type checking included."""
    names = {module(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        wanted: list[str] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
        graph[name] = set(wanted) & names.keys() - {name}
    return graph


def module(path: Path) -> str:
    """Return the dotted name of a file; a package goes by the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another, directly or through others."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        ahead = [name]
        while ahead:
            ahead += (fresh := graph[ahead.pop()] - found)
            found |= fresh
        return found

    after = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in after[name] if name in after[other]) for name in graph}
    return [sorted(group) for group in groups if group]


if __name__ == "__main__":
    main()
