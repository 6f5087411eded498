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
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted = []
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            graph[name] |= {other for other in wanted if other in names and other != name}
    return graph


def module(path: Path) -> str:
    """Return the dotted name of a file; a package goes by the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another, directly or through others (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


if __name__ == "__main__":
    main()
