"""Settings: types, choices and bounds of fields, how they are described, and fields of earlier versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pytest
import torch

import invirtuo as iv
from invirtuo.settings import Settings, described, setting
from invirtuo.verbs.saving import config_from

REGISTRY = {"plain": 1}


@dataclass(frozen=True)
class Base(Settings):
    """A record."""

    RETIRED: ClassVar[Mapping[str, Any]] = {"colour": "red", "sizes": (1, 2)}

    n: int = setting(3, "number of layers", ge=1)
    rate: float = setting(0.5, "log1p(rate) of change", gt=0, lt=1)


@dataclass(frozen=True)
class Record(Base):
    """Another record."""

    kind: Literal["big", "small"] = setting("big", "size")
    name: str = setting("plain", "a name", choices=REGISTRY)
    own: str | None = setting(None, "a name, or none", choices=REGISTRY)
    widths: tuple[int, ...] = setting((8, 8), "of layers", ge=1)
    ends: tuple[float, float] = setting((0.0, 1.0), "of a range", ge=0, le=1)
    pairs: tuple[tuple[str, str], ...] = setting((), "of names")
    weight: float | Mapping[str, float] = setting(1.0, "of all, or by name")
    on: bool = setting(True, "whether it acts")
    free: int | str = 1


ENDS = "expected a pair of numbers, at least 0 and at most 1"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "n is 0; expected a whole number, at least 1"),
        ("n", 1.5, "n is 1.5; expected a whole number, at least 1"),
        ("n", True, "n is True; expected a whole number"),
        ("n", "3", "n is '3'; expected a whole number"),
        ("rate", 0, "rate is 0; expected a number, above 0 and below 1"),
        ("rate", float("nan"), "rate is nan; expected a number, above 0 and below 1"),
        ("rate", None, "rate is None; expected a number"),
        ("kind", "huge", "kind is 'huge'; expected one of big, small"),
        ("kind", ["big"], r"kind is \('big',\); expected one of big, small"),
        ("name", "fancy", "name is 'fancy'; expected one of plain"),
        ("name", {"a": 1}, r"name is {'a': 1}; expected one of plain"),
        ("own", "fancy", "own is 'fancy'; expected one of plain, or None"),
        ("widths", (8, 0), r"widths is \(8, 0\); expected a list of whole numbers, at least 1"),
        ("widths", 8, "widths is 8; expected a list of whole numbers"),
        ("ends", (0.0,), rf"ends is \(0.0,\); {ENDS}"),
        ("ends", (0.0, 2.0), rf"ends is \(0.0, 2.0\); {ENDS}"),
        ("ends", "all", f"ends is 'all'; {ENDS}"),
        ("pairs", [["a"]], r"pairs is \(\('a',\),\); expected a list of pairs of texts"),
        ("weight", {"a": "much"}, "expected a number, or a mapping of names to numbers"),
        ("weight", float("inf"), "weight is inf; expected a number, or a mapping of names to numbers"),
        ("on", 1, "on is 1; expected true or false"),
        ("free", 1.5, "free is 1.5; expected a whole number, or text"),
    ],
)
def test_values_that_cannot_be_meant(field, value, message):
    with pytest.raises(ValueError, match=message):
        Record(**{field: value})


def test_values_become_plain():
    found = Record(n=np.int64(2), rate=np.float32(0.5), widths=np.array([1, 2]), ends=[0, 1], pairs=[["a", "b"]],
                   weight={"a": np.float64(2.0)}, own="plain", free="all")  # fmt: skip
    assert found == Record(2, 0.5, own="plain", widths=(1, 2), ends=(0, 1), pairs=(("a", "b"),), weight={"a": 2.0},
                           free="all")  # fmt: skip
    assert type(found.n) is int and type(found.weight["a"]) is float
    assert Record(widths=pd.Series([1, 2])).widths == Record(widths=torch.tensor([1, 2])).widths == (1, 2)
    assert Record(name=Path("plain")).name == "plain"


def test_registries_are_asked_at_construction(monkeypatch):
    monkeypatch.setitem(REGISTRY, "fancy", 2)
    assert Record(name="fancy").name == "fancy"


def test_records_describe_their_fields():
    assert [each.name for each in described(Record)][:3] == ["n", "rate", "kind"]  # inherited ones first
    assert "free" not in [each.name for each in described(Record)]
    lines = Record.__doc__.splitlines()
    assert lines[:8] == [
        "Another record.",
        "",
        "Parameters",
        "----------",
        "n : a whole number, at least 1, default 3",
        "    Number of layers.",
        "rate : a number, above 0 and below 1, default 0.5",
        "    log1p(rate) of change.",
    ]
    assert "own : one of plain, or None, default None" in lines
    assert Settings.__doc__.startswith("Base of Config records")


CONFIGS = [*(kind.Config for kind in iv.models.MODELS.values()), iv.FitConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{kind.__module__}.{kind.__name__}" for kind in CONFIGS])
def test_numbers_out_of_bounds_are_refused(config):
    """Every number below its bound, and every value of another type, is an error that names the field."""
    for each in described(config):
        with pytest.raises(ValueError, match=rf"{each.name} is <object.*; expected "):
            config(**{each.name: object()})
        if "at least" in each.expected or "above" in each.expected:
            value = (-1,) * len(each.default) if isinstance(each.default, tuple) else -1
            with pytest.raises(ValueError, match=f"{each.name} is .*-1"):
                config(**{each.name: value or (-1,)})
        assert each.doc and not each.doc.endswith(".")


def test_widths_counts_and_rates_have_bounds():
    unbounded = {
        each.name
        for config in CONFIGS
        for each in described(config)
        if "number" in each.expected and not ("at least" in each.expected or "above" in each.expected)
    }
    assert unbounded == {"covariate_scale", "devices", "gene_vectors", "seed"}


# ---- fields of earlier versions --------------------------------------------------------------------------------------


def test_retired_fields_are_left_out_at_the_value_that_holds():
    assert config_from(Record, {"n": 2, "colour": "red", "sizes": [1, 2]}) == Record(2)
    with pytest.raises(ValueError, match=r"Record has no field\(s\) colour='blue' any more; use the version"):
        config_from(Record, {"colour": "blue"})
    with pytest.raises(ValueError, match=r"unknown field\(s\) shade for Record; known: ends, free"):
        config_from(Record, {"shade": "red"})


RETIRED = [kind for kind in iv.models.MODELS.values() if kind.Config.RETIRED]


@pytest.mark.parametrize("kind", RETIRED, ids=[kind.name for kind in RETIRED])
def test_models_saved_with_retired_fields(kind, tmp_path):
    """Load at the value that holds, are the same model for a checkpoint, and are refused at another value."""
    stored = Path(__file__).parent / "stored" / kind.name
    saved = json.loads((stored / "config.json").read_text())["config"]
    retired = dict(kind.Config.RETIRED)
    assert retired.keys() <= saved.keys() and not retired.keys() & {field.name for field in fields(kind.Config)}
    model = iv.load(stored)
    assert model.identity()["config"] == saved  # what a checkpoint of that version compares with

    folder = tmp_path / "changed"
    shutil.copytree(stored, folder)
    facts = json.loads((folder / "config.json").read_text())
    name = next(iter(retired))
    facts["config"][name] = "another"
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"{name}='another' any more; use the version that saved it"):
        iv.load(folder)
