"""Which claims of the PRiMeFlow paper hold in a comparison: differences between two models, with intervals.

Prints a table of scores for each task and one of the claims, as Markdown, and copies the tables beside it.

A difference is taken on the same conditions; its interval covers another choice of conditions and another training
(`invirtuo.bench.paired_differences`), and is so wide that all intervals of a task hold together (Bonferroni). "yes" and
"no": the interval lies on the claimed side of 0, or on the other one. Every claim is judged on cells as they are drawn
and with zeros for both models; models of ours are told of a condition what their rivals are, or anchors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from invirtuo.bench import paired_differences
from studies.comparison import DEVELOPMENT, ZEROS
from studies.harness import Tables, study

LEVEL, N_RESAMPLES = 0.95, 20_000


class Claim(NamedTuple):
    """Of `model` against `other`: "lower", "higher", or "equal" (the interval holds 0) in a metric."""

    text: str
    model: str
    other: str
    metric: str
    way: str


AUTOENCODERS = ("cpa", "cpa:no-adversary", "sams_vae", "sams_vae:simple", "biolord")
OURS = ("primeflow:one-hots", "primeflow")
SHOWN = {"mmd_gex": "lower", "mmd_pca": "lower", "deg_recall": "higher", "cosine_logfc": "higher",
         "rmse_mean": "lower", "variance_ratio": ""}  # fmt: skip


def claims_of(own: str, form: str) -> Iterator[Claim]:
    """The claims of the paper, of one of our networks; `form` ends the labels of learned models."""
    ours, mlp, components = f"{own}{form}", f"primeflow:mlp{form}", f"fm_pca{form}"
    for other in (*AUTOENCODERS, "latent_additive", "linear_additive"):
        yield Claim("smallest MMD of all", ours, f"{other}{form}", "mmd_gex", "lower")
    yield Claim("smallest MMD of all", ours, "decoder_only", "mmd_gex", "lower")
    yield Claim("gene space fits better than components", ours, components, "mmd_gex", "lower")
    yield Claim("gene space finds more DE genes than components", ours, components, "deg_recall", "higher")
    for metric in ("mmd_gex", "rmse_mean"):
        yield Claim("an MLP cannot fit gene space", mlp, ours, metric, "higher")
    for model in AUTOENCODERS:
        yield Claim("autoencoders miss variance", f"{model}{form}", ours, "variance_ratio", "lower")
        yield Claim("autoencoders find fewer DE genes", f"{model}{form}", ours, "deg_recall", "lower")
    for model in ("cpa", "sams_vae"):
        yield Claim("CPA and SAMS-VAE are ahead on pseudobulks", f"{model}{form}", ours, "rmse_mean", "lower")
        yield Claim("CPA and SAMS-VAE are ahead on pseudobulks", f"{model}{form}", ours, "cosine_logfc", "higher")
    for baseline in ("no_change", "perturbation_mean:move-cells", "ridge:kernel-move-cells", "ridge:move-cells"):
        for metric, way in (("mmd_gex", "lower"), ("rmse_mean", "lower"), ("deg_recall", "higher")):
            yield Claim("not in the paper: ahead of simple baselines", ours, baseline, metric, way)


FORMS = ("", f", {ZEROS}")
CLAIMS = (
    *(claim for own in OURS for form in FORMS for claim in claims_of(own, form)),
    *(
        Claim("optimal transport does not matter", f"fm_pca:ot{form}", f"fm_pca{form}", metric, "equal")
        for form in FORMS
        for metric in ("mmd_gex", "deg_recall")
    ),
    *(
        Claim(text, f"{model}, guidance {weight}", model, metric, "higher")
        for model in ("primeflow", "fm_pca")
        for weight, metric, text in (
            (5, "mmd_gex", "guidance costs MMD"),
            (3, "deg_recall", "guidance finds more DE genes"),
        )
    ),
)


@study()
def claims(results: Path, *, out: Path) -> Tables:
    """Which claims of the PRiMeFlow paper hold in a comparison that has been run.

    Parameters
    ----------
    results
        A folder of the study `comparison`: OUT/evaluated, or OUT/train.
    """
    summary = pd.read_csv(results / "summary.csv")
    scores = pd.read_csv(results / "scores.csv")
    for task, scored in summary.groupby("task", sort=False):
        print(f"### {task}\n\n{markdown(score_table(scored))}\n")
    table = pd.concat([judged(own) for _, own in scores.groupby("task", sort=False)], ignore_index=True)
    order = ["claim", "model", "against", "metric"]
    wide = table.pivot_table(index=order, columns="task", values="holds", aggfunc="first", sort=False)
    print(markdown(wide.fillna("").reset_index()))
    for name in ("summary.csv", "costs.csv", "run.json"):
        shutil.copy(results / name, out / name)
    scores.round(5).to_csv(out / "scores.csv.gz", index=False)
    return {"claims": table}


def judged(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and form of the values: both models, no change, the difference, its interval, the verdict.

    Parameters
    ----------
    scores
        Of one task; conditions that a choice has looked at do not count.
    """
    task = scores["task"].iloc[0]
    scores = scores[~scores["condition"].isin(DEVELOPMENT.get(task, ()))]
    labels = set(scores["model"])
    asked = [claim for claim in CLAIMS if labels >= {claim.model, claim.other}]
    level = 1 - (1 - LEVEL) / max(len(asked), 1)
    rows = []
    for claim in asked:
        measured = scores[scores["metric"] == claim.metric]
        means = measured.groupby("model")["value"].mean()
        two = measured[measured["model"].isin((claim.model, claim.other))]
        found = paired_differences(two, level=level, n_resamples=N_RESAMPLES).set_index("model").loc[claim.model]
        rows.append({
            "claim": claim.text, "task": task, "metric": claim.metric, "model": claim.model, "against": claim.other,
            "value": means[claim.model], "value against": means[claim.other], "no_change": means["no_change"],
            **found[["difference", "low", "high", "n_conditions", "n_seeds"]], "claimed": claim.way,
            "holds": verdict(claim.way, found["low"], found["high"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def verdict(way: str, low: float, high: float) -> str:
    """What an interval of a difference says of a claim: yes, no, or open; "equal" can only be refuted."""
    above, below = low > 0, high < 0
    holds, fails = {"higher": (above, below), "lower": (below, above), "equal": (False, above or below)}[way]
    return "yes" if holds else "no" if fails else "open"


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
