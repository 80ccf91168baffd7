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


@pytest.mark.parametrize("room", ["metrics", "reports"])
def test_judging_knows_no_model(room):
    for name, file in MODULES.items():
        if name.split(".")[1:2] == [room]:
            assert not {structure.room_of(other) for other in imported(file, MODULES)} & {"verbs", "models", "bench"}, (
                name
            )


def test_no_paper_imports_another():
    """A folder of models is one paper, or a family of papers."""
    for name, file in MODULES.items():
        own = name.split(".")[1:3]
        if own[:1] == ["models"] and len(own) > 1:
            others = {tuple(other.split(".")[1:3]) for other in imported(file, MODULES)}
            assert {other for other in others if other[:1] == ("models",)} <= {tuple(own), ("models",)}, name


# ---- statements ------------------------------------------------------------------------------------------------------


def fullest() -> dict[str, int]:
    """Statements with more syntax nodes than a reader takes in at once, or with several comprehensions, by file."""
    found = {}
    for name, file in MODULES.items():
        own = statements(ast.parse(file.read_text(encoding="utf-8")))
        full = sum(nodes > MOST_NODES or comprehensions > 1 for _, nodes, comprehensions in own)
        if full:
            found[name] = full
    return found
