"""The order of the package's folders, read from all of its imports.

`python tests/house.py` prints the folders with their files, lines and floors of imports, and the
functions with many parameters. `test_house.py` checks the order.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sret_cli"

# A folder imports only from folders of earlier levels; folders of one level do not know each other.
ORDER = (
    ("runtime",),
    ("spec",),
    ("data", "model"),
    ("weights", "cost"),
    ("training",),
    ("study", "probe"),
    ("report",),
    ("commands",),
)
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
MOST_PARAMETERS = 8


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """All files of the package by their dotted names below it, such as `cost.count`."""
    paths = sorted(package.rglob("*.py"))
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each file, the files of the package that it imports from, at any depth of its code."""
    known = modules(package)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        if name == "__init__":
            continue  # the package's face, which hands on what the folders define
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            found[name] |= set(_in_package(targets, known))
    return found


def _in_package(targets: list[str], known: dict[str, Path]) -> Iterator[str]:
    for target in targets:
        head, _, rest = target.partition(".")
        if head != "sret_cli":
            continue
        for name in (rest, rest.rpartition(".")[0]):
            for module in (name, f"{name}.__init__" if name else "__init__"):
                if module in known:
                    yield module
                    break
            else:
                continue
            break


def folder(module: str) -> str:
    """The folder of a file; empty for those at the top."""
    return module.rpartition(".")[0]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that go against the order of the folders."""
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in sorted(targets)
        if folder(name) != folder(target)
        and folder(name)
        and target != "__init__"  # which every file may ask for the version
        and LEVEL[folder(name)] <= LEVEL.get(folder(target), len(ORDER))
    ]


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """How many imports deep each file stands: 1 where it imports none of the others.

    Raises:
        ValueError: files import each other in a circle.
    """
    heights: dict[str, int] = {}

    def height(name: str, path: tuple[str, ...] = ()) -> int:
        if name in path:
            raise ValueError("a circle of imports: " + " -> ".join((*path, name)))
        if name not in heights:
            below = [height(target, (*path, name)) for target in edges[name] if target in edges]
            heights[name] = 1 + max(below, default=0)
        return heights[name]

    for name in edges:
        height(name)
    return heights


def inside(edges: dict[str, set[str]], place: str) -> dict[str, set[str]]:
    """The imports between the files of one folder."""
    names = {name for name in edges if folder(name) == place}
    return {name: edges[name] & names for name in names}


def wide_functions(package: Path = PACKAGE) -> list[str]:
    """Functions outside `commands` with more than `MOST_PARAMETERS` parameters, without `self`."""
    found = []
    for name, path in modules(package).items():
        if folder(name) == "commands":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                count = sum(argument.arg not in ("self", "cls") for argument in every)
                if count > MOST_PARAMETERS:
                    found.append(f"{name}.{node.name} ({count})")
    return found


def main() -> None:
    """Prints the house."""
    package = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE
    edges, known = imports(package), modules(package)
    places = sorted({folder(name) for name in known}, key=lambda p: LEVEL.get(p, -1))
    print(f"{'folder':10} {'files':>5} {'lines':>6} {'longest':>7} {'floors':>6}")
    for place in places:
        names = [name for name in known if folder(name) == place]
        lines = [len(known[name].read_text(encoding="utf-8").splitlines()) for name in names]
        height = max(floors(inside(edges, place)).values())
        print(f"{place or '(top)':10} {len(names):5} {sum(lines):6,} {max(lines):7} {height:6}")
    between = {
        place: {folder(t) for n in edges if folder(n) == place for t in edges[n]} - {place, ""}
        for place in places
        if place
    }
    print(f"floors of folders: {max(floors(between).values())}")
    print(f"floors of files:   {max(floors(edges).values())}")
    wide = wide_functions(package)
    print(f"functions with more than {MOST_PARAMETERS} parameters: {len(wide)}")
    for line in wide:
        print(f"  {line}")


if __name__ == "__main__":
    main()
