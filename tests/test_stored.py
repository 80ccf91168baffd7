"""What every model gives, as it was stored: saved models, the outputs of their verbs, and all presets.

``python tests/test_stored.py CASE ...`` stores cases anew, after a change that is meant to change them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CASES, call, experiment, fitted, values, verbs

import invirtuo as iv
from invirtuo.verbs.model import Model

STORED = Path(__file__).parent / "stored"
PRESETS = STORED / "presets.json"
SMALL = 5_000_000  # parameters of the presets that are fitted, for two steps
FIRST = 6  # rows that are stored, of cells that are drawn or asked for
OPTIONS = ({}, {"guidance": 2.0}, {"solver": "rk4"}, {"effect_level": 0.8})


def folder_of(case: str) -> Path:
    return STORED / case.replace(",", "").replace(" ", "_")


def outputs(case: str, model: Model) -> dict[str, np.ndarray]:
    """What the verbs of a model give, by verb and options: the first cells."""
    found = {}
    few = experiment(type(model))[0][:FIRST].copy()
    own = {f.name for f in fields(model.Sampling)} | ({"effect_level"} if model.verb == "predict" else set())
    for verb in verbs(model):
        for options in OPTIONS:
            never_null = getattr(model.config, "prob_unconditional", 1) == 0
            if options.keys() <= own and not (never_null and "guidance" in options):
                found[f"{verb} {options}"] = call(case, verb, model=model, **options)
    if hasattr(model, "embed"):
        found["embed"] = model.embed(few)
    if hasattr(model, "impute"):
        found["impute"] = model.impute(few, flow=True)
        found["correct"] = model.correct(few, "cell_type")
    if hasattr(model, "network"):
        found["knock_out"] = model.knock_out(model.genes[0])
        found["network"] = model.network()[["score", "sign", "consistency"]].to_numpy(float)
    arrays = {}
    for name, result in found.items():
        parts = [result] if isinstance(result, np.ndarray) else values(result)
        arrays |= {f"{name} {i}": spread(part).astype(np.float32) for i, part in enumerate(parts)}
    return arrays


def spread(rows: np.ndarray) -> np.ndarray:
    """A few rows from the first to the last."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, FIRST).astype(int))]


def preset_facts(kind: type[Model], name: str) -> dict:
    """What a preset says, the size of its network, and the losses of two steps where it is small."""
    cells, design, split = experiment(kind)
    preset = kind.PRESETS[name]
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in kind(design, cells.var_names, name).parameters())
    facts = {"config": asdict(preset.config), "fit": asdict(preset.fit), "n_parameters": n_parameters, "losses": []}
    if 0 < n_parameters <= SMALL:
        few = {"steps": 2, "batch_size": 32, "accumulate": 1, "precision": "fp32", "accelerator": "cpu"}
        config = replace(preset.fit, **few, val_every=0, progress=False, compile=False)
        history = kind(design, cells.var_names, name).fit(cells, split, config).history
        facts["losses"] = history["train_total"].tolist()
    return json.loads(json.dumps(facts))


def alike(found: dict[str, np.ndarray], stored: dict[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """Names of outputs of which more than a hundredth differs by more than the tolerance, and how much differs."""
    assert sorted(found) == sorted(stored)
    shares = {name: np.isclose(found[name], stored[name], rtol=tolerance, atol=tolerance).mean() for name in stored}
    return {name: 1 - share for name, share in shares.items() if share < 0.99}


@pytest.mark.parametrize("case", CASES)
def test_saved_models_give_what_they_gave(case):
    model = iv.load(folder_of(case))
    stored = dict(np.load(folder_of(case) / "outputs.npz"))
    assert alike(outputs(case, model), stored, 1e-3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fits_give_what_they_gave(case):
    found, stored = outputs(case, fitted(case)), dict(np.load(folder_of(case) / "outputs.npz"))
    if fitted(case).verb == "generate":  # one count that differs by rounding shifts the random numbers of all others
        found, stored = ({k: x for k, x in arrays.items() if "predict" not in k} for arrays in (found, stored))
    assert alike(found, stored, 2e-2) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", iv.models.MODELS.values(), ids=iv.models.MODELS.keys())
def test_presets_are_what_they_were(kind):
    stored = json.loads(PRESETS.read_text())[kind.name]
    assert sorted(stored) == sorted(kind.PRESETS)
    for name, expected in stored.items():
        found = preset_facts(kind, name)
        assert found.pop("losses") == pytest.approx(expected.pop("losses"), rel=5e-3), name
        assert found == expected, name


def store(case: str) -> None:
    model = fitted(case)
    model.save(folder_of(case), overwrite=True)
    np.savez_compressed(folder_of(case) / "outputs.npz", **outputs(case, model))


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        store(case)
    facts = {kind.name: {name: preset_facts(kind, name) for name in kind.PRESETS} for kind in iv.models.MODELS.values()}
    PRESETS.write_text(json.dumps(facts, sort_keys=True) + "\n")
