"""Which claims of the PRiMeFlow paper hold in a comparison: differences between two models, with intervals.

Prints a table of scores for each task and one of the claims, as Markdown, and copies the tables beside it.

A difference is taken on the same conditions; its interval covers another choice of conditions and another training
(`invirtuo.bench.paired_differences`). "yes" and "no": the interval lies on the claimed side of 0, or on the other one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from invirtuo.bench import paired_differences
from studies.harness import Tables, study


class Claim(NamedTuple):
    """Of `model` against `other`: "lower", "higher", or "equal" (the interval holds 0) in a metric."""

    text: str
    model: str
    other: str
    metric: str
    way: str


AUTOENCODERS = ("cpa", "cpa:no-adversary", "sams_vae", "sams_vae:simple", "biolord")
GUIDED = ("primeflow", "fm_pca")
SHOWN = {"mmd_gex": "lower", "mmd_pca": "lower", "deg_recall": "higher", "cosine_logfc": "higher",
         "rmse_mean": "lower", "variance_ratio": ""}  # fmt: skip
CLAIMS = (
    *(
        Claim("smallest MMD of all", "primeflow", other, "mmd_gex", "lower")
        for other in ("fm_pca", *AUTOENCODERS, "latent_additive", "decoder_only", "linear_additive")
    ),
    Claim("gene space fits better than components", "primeflow", "fm_pca", "mmd_gex", "lower"),
    Claim("gene space finds more DE genes than components", "primeflow", "fm_pca", "deg_recall", "higher"),
    Claim("an MLP cannot fit gene space", "primeflow:mlp", "primeflow", "mmd_gex", "higher"),
    Claim("an MLP cannot fit gene space", "primeflow:mlp", "primeflow", "rmse_mean", "higher"),
    Claim("optimal transport does not matter", "fm_pca:ot", "fm_pca", "mmd_gex", "equal"),
    Claim("optimal transport does not matter", "fm_pca:ot", "fm_pca", "deg_recall", "equal"),
    *(
        Claim(text, f"{model}, guidance {weight}", model, metric, "higher")
        for model in GUIDED
        for weight, metric, text in (
            (5, "mmd_gex", "guidance costs MMD"),
            (3, "deg_recall", "guidance finds more DE genes"),
        )
    ),
    *(
        Claim(text, model, "primeflow", metric, "lower")
        for model in AUTOENCODERS
        for metric, text in (
            ("variance_ratio", "autoencoders miss variance"),
            ("deg_recall", "autoencoders find fewer DE genes"),
        )
    ),
    *(
        Claim("CPA and SAMS-VAE are ahead on pseudobulks", model, "primeflow", metric, way)
        for model in ("cpa", "sams_vae")
        for metric, way in (("rmse_mean", "lower"), ("cosine_logfc", "higher"))
    ),
    *(
        Claim("not in the paper: ahead of the best simple baseline", "primeflow", baseline, metric, way)
        for baseline in ("perturbation_mean:shift-cells", "ridge:kernel")
        for metric, way in (("mmd_gex", "lower"), ("rmse_mean", "lower"), ("deg_recall", "higher"))
    ),
)


@study()
def claims(results: Path, *, out: Path) -> Tables:
    """Which claims of the PRiMeFlow paper hold in a comparison that has been run.

    Parameters
    ----------
    results
        Folder of the study `comparison`.
    """
    summary = pd.read_csv(results / "summary.csv")
    scores = pd.read_csv(results / "scores.csv")
    for task, scored in summary.groupby("task", sort=False):
        print(f"### {task}\n\n{markdown(score_table(scored))}\n")
    table = judged(scores)
    order = ["claim", "model", "against", "metric"]
    wide = table.pivot_table(index=order, columns="task", values="holds", aggfunc="first", sort=False)
    print(markdown(wide.fillna("").reset_index()))
    for name in ("summary.csv", "costs.csv", "run.json"):
        shutil.copy(results / name, out / name)
    scores.round(5).to_csv(out / "scores.csv.gz", index=False)
    return {"claims": table}


def judged(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and task: values of both models, their difference, its interval, and whether it holds."""
    means = scores.groupby(["task", "metric", "model"])["value"].mean()
    differences = paired_differences(scores[scores["metric"].isin({claim.metric for claim in CLAIMS})])
    found = differences.set_index(["task", "metric", "model", "against"])
    rows = []
    for claim in CLAIMS:
        for task in scores["task"].unique():
            key = (task, claim.metric, claim.model, claim.other)
            if key in found.index:
                values = [means[task, claim.metric, name] for name in (claim.model, claim.other)]
                rows.append(_row(claim, task, values, found.loc[key]))
    return pd.DataFrame(rows)


def _row(claim: Claim, task: str, values: list[float], found: pd.Series) -> dict:
    low, high = found["low"], found["high"]
    above, below = low > 0, high < 0
    holds, fails = {"higher": (above, below), "lower": (below, above), "equal": (not above and not below, False)}[
        claim.way
    ]
    return {
        "claim": claim.text, "task": task, "metric": claim.metric, "model": claim.model, "value": values[0],
        "against": claim.other, "value against": values[1], "difference": found["difference"], "low": low, "high": high,
        "n_conditions": found["n_conditions"], "claimed": claim.way,
        "holds": "yes" if holds else "no" if fails or claim.way == "equal" else "open",
    }  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = (table.columns, ["---"] * table.shape[1], *table.to_numpy())
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def score_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Models x metrics of one task: mean and standard deviation over seeds, the best of the models in bold."""
    means = summary.pivot_table(index="model", columns="metric", values="mean", sort=False)[list(SHOWN)]
    spread = summary.pivot_table(index="model", columns="metric", values="sd", sort=False).reindex_like(means).fillna(0)
    text = means.map("{:.3g}".format) + spread.map(" ± {:.1g}".format).where(spread > 0, "")
    for metric, way in SHOWN.items():
        judged = means[metric].drop("noise_floor", errors="ignore")
        best = {"lower": judged.idxmin(), "higher": judged.idxmax(), "": (judged - 1).abs().idxmin()}[way]
        text.loc[best, metric] = f"**{text.loc[best, metric]}**"
    return text.rename_axis(None, axis=1).reset_index()
