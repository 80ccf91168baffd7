"""The plan of the house: docs/architecture.md is what the imports say, imports point down, statements do one thing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import structure
from structure import arrows, file_circles, floors, imported, modules, outside, statements

ROOT = Path(__file__).parents[1]
MODULES = modules(ROOT)
INSIDE = re.compile(r"^\| `metrics/` \|.*\n\|---.*\n((?:\| .*\n)+)", re.MULTILINE)  # table inside metrics
ROOM = re.compile(r"^\| (\d+) \| `(\w+)` \|", re.MULTILINE)
MOST_NODES = 40  # syntax nodes of a statement


def plan() -> dict[str, int]:
    """Floor of every room, as the page says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {room: int(floor) for floor, room in ROOM.findall(page)}


def test_the_page_says_where_the_rooms_are():
    assert plan() == floors(ROOT)


def test_imports_point_down():
    """Types included; nothing imports what stands on its own floor or above."""
    floor = plan()
    assert [(a, b) for a, b in sorted(arrows(ROOT)) if floor[a] <= floor[b]] == []


def test_no_circle_of_files():
    assert file_circles(ROOT) == []


@pytest.mark.parametrize("room", ["nn", "flow", "batch"])
def test_mathematics_knows_no_anndata(room):
    for name, file in MODULES.items():
        if name.split(".")[1:2] == [room]:
            assert "anndata" not in outside(file), name


@pytest.mark.parametrize("room", ["metrics", "plots", "reports"])
def test_judging_knows_no_model(room):
    for name, file in MODULES.items():
        if name.split(".")[1:2] == [room]:
            assert not {structure.room_of(other) for other in imported(file, MODULES)} & {"verbs", "models", "bench"}, (
                name
            )


def test_metrics_point_down():
    """Rows of the table of `metrics`, the ground first."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in INSIDE.search(page).group(1).splitlines()]
    row = {name: i for i, names in enumerate(rows) for name in names}
    own = {name: file for name, file in MODULES.items() if name.startswith("invirtuo.metrics.")}
    for name, file in own.items():
        for other in imported(file, own):
            assert row[other.split(".")[2]] <= row[name.split(".")[2]], (name, other)


def test_no_paper_imports_another():
    """A folder of models is one paper, or a family of papers."""
    for name, file in MODULES.items():
        own = name.split(".")[1:3]
        if own[:1] == ["models"] and len(own) > 1:
            others = {tuple(other.split(".")[1:3]) for other in imported(file, MODULES)}
            assert {other for other in others if other[:1] == ("models",)} <= {tuple(own), ("models",)}, name


# ---- statements ------------------------------------------------------------------------------------------------------


EXCEPTIONS = {  # full statements by file; records and calls that hand many arguments on are read entry by entry
    "invirtuo.bench.cell": 1,
    "invirtuo.bench.run": 1,
    "invirtuo.cells.one_file": 3,  # its form is measured
    "invirtuo.cli.judging": 1,
    "invirtuo.fit.loop": 1,
    "invirtuo.fit.training": 1,
    "invirtuo.models.primeflow.velocity": 2,
    "invirtuo.models.state.attention": 2,  # its form is measured
    "invirtuo.models.state.energy": 2,  # its form is measured
    "invirtuo.verbs.model": 1,
    "invirtuo.verbs.saving": 1,
}


def full_statements(file: Path) -> int:
    """Statements in functions that are more than a reader takes in at once, or hold several comprehensions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tables = [line for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef) for line in node.body]
    found = [(nodes, n) for line, nodes, n in statements(tree) if line not in tables and not hasattr(line, "body")]
    return sum(nodes > MOST_NODES or n > 1 for nodes, n in found)


def test_a_statement_does_one_thing():
    """Fewer full statements than the list allows are a reason to shorten it."""
    found = {name: full_statements(file) for name, file in MODULES.items()}
    assert {name: n for name, n in found.items() if n} == EXCEPTIONS
