"""Terminal tables: words stay whole at 80 columns, whatever is compared."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from invirtuo.cli.data import print_model
from invirtuo.cli.options import print_rows, print_scores
from invirtuo.fit import FitConfig
from invirtuo.metrics import METRICS, PROFILES
from invirtuo.metrics.scores import FLOOR_NOTE
from invirtuo.models import MODELS as KINDS
from invirtuo.settings import described

DOCS = Path(__file__).parents[1] / "docs"
MODELS = ["primeflow", "perturbation_mean:shift-cells", "noise_floor", "cfgen", "independent_nb", "training cells"]


def shown(show, *arguments, **options) -> str:
    console = Console(width=80, file=io.StringIO())
    show(*arguments, **options, console=console)
    return console.file.getvalue()


def scores(models, metrics) -> pd.DataFrame:
    rows = [(model, metric, i + 0.1234 * k) for i, model in enumerate(models) for k, metric in enumerate(metrics)]
    return pd.DataFrame(rows, columns=["model", "metric", "value"])


def words(*texts) -> set[str]:
    return {word for text in texts for word in text.split()}


@pytest.mark.parametrize("n_models", [1, 2, 6])
@pytest.mark.parametrize("profile", ["generation", "perturbench", "minimal"])
def test_scores_at_80_columns(profile, n_models):
    models, metrics = MODELS[:n_models], PROFILES[profile]
    text = shown(print_scores, scores(models, metrics))
    assert max(map(len, text.splitlines())) <= 80
    assert words(*models, *metrics) <= words(text)  # none is broken
    numbers = [f"{i + 0.1234 * k:.3f}" for i in range(n_models) for k in range(len(metrics))]
    assert sorted(word for word in text.split() if word.replace(".", "").isdigit()) == sorted(numbers)


def test_many_metrics_have_a_row_each():
    text = shown(print_scores, scores(["cfgen", "noise_floor"], PROFILES["generation"]))
    lines = text.splitlines()
    assert lines[0].split() == ["metric", "cfgen", "noise_floor"]
    assert lines[1].split() == ["mmd_rbf_disjoint", "↓", "0.000", "1.000"]
    assert len(lines) == 1 + len(PROFILES["generation"])


def test_few_metrics_have_a_column_each():
    lines = shown(print_scores, scores(["cpa", "ridge"], ["mmd_gex", "deg_recall"])).splitlines()
    assert lines[0].split() == ["model", "mmd_gex", "↓", "deg_recall", "↑"]
    assert lines[2].split() == ["ridge", "1.000", "1.123"]


def test_the_noise_floor_is_explained_where_it_stands():
    table = scores(["cfgen", "noise_floor"], ["rmse_mean"])
    halves = table.assign(n_real=30)
    assert " ".join(shown(print_scores, halves).split()).endswith(FLOOR_NOTE)
    for other in (table, halves[halves["model"] == "cfgen"]):  # a floor of another kind, none
        assert "noise floor" not in shown(print_scores, other)
    assert FLOOR_NOTE in (DOCS / "metrics.md").read_text(encoding="utf-8")


def test_arrows_say_what_is_better():
    text = shown(print_scores, scores(["cpa"], list(METRICS)))
    for name, record in METRICS.items():
        line = next(line.split() for line in text.splitlines() if line.split()[0] == name)
        assert line[1:-1] == {"higher": ["↑"], "lower": ["↓"], None: []}[record.direction]


def test_wide_tables_go_on_below_with_their_first_column():
    header = ("gene", *(f"a_column_of_width_{i}" for i in range(9)))
    rows = [("ISG15", *range(9)), ("[IFIT3]", *range(9))]
    text = shown(print_rows, rows, header=header)
    assert max(map(len, text.splitlines())) <= 80
    assert words(*header) <= words(text)
    assert text.count("[IFIT3]") == text.count("gene") == 3
    assert sorted(filter(str.isdigit, text.split())) == sorted(np.repeat([str(i) for i in range(9)], 2))


def test_a_column_wider_than_the_terminal_is_folded():
    text = shown(print_rows, [("a", "x" * 200)], header=("name", "value"))
    assert text.count("x") == 200 and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_settings_at_80_columns(kind):
    """Every field, what it means and takes; presets with their source; the FitConfig if asked."""
    text = shown(print_model, kind.name, fit=True)
    assert max(map(len, text.splitlines())) <= 80
    plain = shown(print_model, kind.name)
    assert text.startswith(plain) and "--fit-set" not in plain
    fields = [*described(kind.Config), *described(FitConfig)]
    meanings = [part for each in fields for part in (each.name, each.doc, f"({each.expected})")]
    presets = [part for name, preset in kind.PRESETS.items() for part in (name, preset.source)]
    assert words(*meanings, *presets) <= words(text)
