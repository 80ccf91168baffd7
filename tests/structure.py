"""Measures of the structure of the source: rooms, floors, circles, lengths, density.

``python tests/structure.py [ROOT ...]`` prints them side by side, one column for each checkout.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, quantiles

PACKAGE = "invirtuo"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_ROOMS = {PACKAGE, "__main__", "_former"}  # the face of the package, its entry point, names of the past
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file, of every module of the package."""
    source = root / "src"
    files = sorted(file for file in (source / PACKAGE).rglob("*.py"))
    names = [".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def imported(file: Path, known: dict[str, Path], *, types: bool = True) -> set[str]:
    """Modules of the package that a file imports anywhere; `types`: also for the type checker alone."""
    found = set()
    for node in _walk(ast.parse(file.read_text()), types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else str(node.module))
    return found & set(known)


def outside(file: Path) -> set[str]:
    """Top-level packages outside of this one that a file imports anywhere."""
    found = set()
    for node in _walk(ast.parse(file.read_text()), types=True):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - {PACKAGE}


def _walk(node: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
        if types or not for_types:
            yield from _walk(child, types=types)


def room_of(module: str) -> str:
    """First name below the package: the folder or file at the top."""
    return [*module.split("."), PACKAGE][1]


def arrows(root: Path) -> set[tuple[str, str]]:
    """Which room imports which, types included."""
    known = modules(root)
    pairs = {(room_of(name), room_of(other)) for name, file in known.items() for other in imported(file, known)}
    return {(a, b) for a, b in pairs if a != b and not {a, b} & NO_ROOMS}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other (Tarjan)."""
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
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def file_circles(root: Path) -> list[list[str]]:
    """Circles of files, imports for the type checker included."""
    known = modules(root)
    graph = {name: imported(file, known) - {name} for name, file in known.items()}
    return circles(graph)


def floors(root: Path) -> dict[str, int]:
    """Floor of every room: one above the highest that it imports; rooms of a circle share one."""
    below: dict[str, set[str]] = {room_of(name): set() for name in modules(root)}
    for a, b in arrows(root):
        below[a].add(b)
    together = {room: set(group) for group in circles(below) for room in group}
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            own = together.get(room, {room})
            others = {b for r in own for b in below[r]} - own
            level = 1 + max(map(floor, others), default=0)
            known.update(dict.fromkeys(own, level))
        return known[room]

    return {room: floor(room) for room in below if room not in NO_ROOMS}


def statements(tree: ast.AST) -> Iterator[tuple[ast.stmt, int, int]]:
    """Every statement, the syntax nodes of its own line, without its body, and the comprehensions among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not _is_docstring(node):
            own = list(_own(node))
            yield node, len(own), sum(isinstance(n, COMPREHENSIONS) for n in own)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _own(child)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(text: str) -> tuple[set[int], int, int]:
    """Numbers of the lines with code, number of own-line comments, and of tokens."""
    code, comments, n_tokens = set(), 0, 0
    documentation = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and _is_docstring(node)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            comments += 1
        if token.type not in LAYOUT and token.start[0] not in documentation:
            code |= set(range(token.start[0], token.end[0] + 1))
            n_tokens += 1
    return code, comments, n_tokens


def measures(root: Path) -> dict[str, float]:
    """All measures of a checkout."""
    files = list(modules(root).values())
    texts = [file.read_text() for file in files]
    trees = [ast.parse(text) for text in texts]
    lines = [code_lines(text) for text in texts]
    n_code = sum(len(code) for code, _, _ in lines)
    every = [item for tree in trees for item in statements(tree)]
    simple = [nodes for statement, nodes, _ in every if not hasattr(statement, "body")]
    functions = [
        len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for tree, (code, _, _) in zip(trees, lines, strict=True)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    lengths = [text.count("\n") for text in texts]
    rooms = floors(root)
    return {
        "rooms": len(rooms),
        "floors": max(rooms.values()),
        "arrows": len(arrows(root)),
        "circles of rooms": len(circles({room: {b for a, b in arrows(root) if a == room} for room in rooms})),
        "circles of files": len(file_circles(root)),
        "files": len(files),
        "lines of src": sum(lengths),
        "lines of code in src": n_code,
        "lines of tests": _lines(root, "tests"),
        "lines of studies": _lines(root, "studies") + _lines(root, "benchmarks"),
        "lines of docs": sum(file.read_text().count("\n") for file in (root / "docs").rglob("*.md")),
        "longest file": max(lengths),
        "median function, lines of code": median(functions),
        "99 % of functions, lines of code": quantiles(functions, n=100)[98],
        "longest function, lines of code": max(functions),
        "tokens a line of code": sum(n for _, _, n in lines) / n_code,
        "syntax nodes a statement, mean": mean(simple),
        "statements over 40 nodes": sum(nodes > 40 for nodes in simple),
        "comprehensions per 100 lines of code": 100 * sum(n for *_, n in every) / n_code,
        "statements with several comprehensions": sum(n > 1 for *_, n in every),
        "own-line comments, % of lines of code": 100 * sum(n for _, n, _ in lines) / n_code,
        "fields of settings": sum(_n_settings(tree) for tree in trees),
        "public names": sum(_n_public(tree) for tree in trees),
    }


def _lines(root: Path, folder: str) -> int:
    return sum(file.read_text().count("\n") for file in (root / folder).rglob("*.py"))


def _n_settings(tree: ast.AST) -> int:
    """Fields of the records of settings."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [getattr(base, "id", "") for base in node.bases] for node in classes}
    records = [node for node in classes if any("Settings" in b or "Sampling" in b for b in bases[node.name])]
    return sum(
        isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
        for node in records
        for line in node.body
    )


def _n_public(tree: ast.AST) -> int:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return len(getattr(node.value, "elts", ()))
    return 0


if __name__ == "__main__":
    roots = [Path(root) for root in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = [measures(root) for root in roots]
    for name in columns[0]:
        print(f"{name:45}" + "".join(f"{column[name]:12.4g}" for column in columns))
