"""The named tasks. A task is added by writing one record."""

from __future__ import annotations

from functools import partial

import pandas as pd

from invirtuo import splits
from invirtuo.bench.task import JUDGED, PUBLISHED, Task

__all__ = ["TASKS"]

RANKED = (*JUDGED, *(f"{name}_rank" for name in PUBLISHED))
SMALLEST = 20  # cells a condition needs to be judged as a population
CYTOKINES, LINES = ("IFNG", "INS", "TGFB"), ("k562", "mcf7", "ht29", "hap1")


def populated(obs: pd.DataFrame, *, columns: tuple[str, ...]) -> pd.Series:
    """Single cells, of groups that have at least 20 of them with and without the perturbation."""
    single = obs["demuxlet_call"] == "SNG"
    groups = obs[list(columns)].astype(str).agg("|".join, axis=1)
    sizes = pd.crosstab(groups[single], obs["perturbation"][single].astype(str)).min(axis=1)
    return single & groups.isin(sizes.index[sizes >= SMALLEST])


def clear_guides(obs: pd.DataFrame) -> pd.Series:
    """Cells of which one guide has at least 80 % of the guide reads."""
    return obs["grna_frac"] >= 0.8


def _where(column: str, *values: str) -> tuple[dict[str, str], ...]:
    """Conditions with these values in a column."""
    return tuple({column: value} for value in values)


GENE_SETS = "go_bp_human_2026.gmt.gz"  # GO biological process, from the user
DONORS = ("PW030", "PW032", "PW034", "PW036", "PW040")

# each donor in turn is tested, and the next one is for validation
LEAVE_ONE_DONOR_OUT = tuple(
    partial(splits.hold_out, conditions=_where("donor", donor), val=_where("donor", following))
    for donor, following in zip(DONORS, (*DONORS[1:], DONORS[0]), strict=True)
)
JIANG_CONTEXTS = tuple(f"{line}|{cytokine}" for cytokine in CYTOKINES for line in LINES)

KANG = (
    Task(
        "kang-demo",
        "IFN-beta response of B cells and CD14 monocytes, bundled cells",
        "kang",
        (
            partial(
                splits.hold_out,
                conditions=_where("cell_type", "B cell", "CD14 monocyte"),
                val=_where("cell_type", "NK cell"),
            ),
        ),
    ),
    Task(
        "kang-celltype",
        "IFN-beta response of three cell types that were never seen responding",
        "kang_full",
        (
            partial(
                splits.hold_out,
                conditions=_where("cell_type_coarse", "B cells", "FCGR3A+ Monocytes", "NK cells"),
                val=_where("cell_type_coarse", "CD8 T cells", "Dendritic cells"),
            ),
        ),
        keep=partial(populated, columns=("cell_type_coarse",)),
        n_genes=2000,
    ),
    Task(
        "kang-donor",
        "IFN-beta response, by cell type, of three donors that were never seen responding",
        "kang_full",
        (
            partial(
                splits.hold_out,
                conditions=_where("donor", "101", "1015", "1256"),
                val=_where("donor", "1016"),
            ),
        ),
        covariates=("donor", "cell_type_coarse"),
        keep=partial(populated, columns=("donor", "cell_type_coarse")),
        n_genes=2000,
    ),
)
OTHERS = (
    Task(
        "glioblastoma-donor",
        "response of a tumour to panobinostat, each of five patients left out in turn",
        "glioblastoma",
        LEAVE_ONE_DONOR_OUT,
    ),
    Task(
        "papalexi-replicate",
        "knock-outs in a replicate in which they were not seen",
        "papalexi",
        (partial(splits.manual, groups=("rep_3",), seed=0, fraction=1.0),),
        keep=clear_guides,
        metrics=RANKED,
    ),
    Task(
        "papalexi-target",
        "knock-outs that were seen nowhere, known by the GO terms of their genes",
        "papalexi",
        tuple(partial(splits.unseen_targets, fold=fold) for fold in range(5)),
        keep=clear_guides,
        unseen=True,
        features=(GENE_SETS,),
    ),
    Task(
        "papalexi-both",
        "the same, in a replicate that is known by its control cells alone",
        "papalexi",
        tuple(partial(splits.unseen_targets, fold=fold, contexts=("rep_3",)) for fold in range(5)),
        keep=clear_guides,
        unseen=True,
        features=(GENE_SETS,),
    ),
    Task(
        "norman-mini-combo",
        "pairs of activated genes, all single ones known; for the workings, not for claims",
        "norman_mini",
        (
            # the five pairs of which both single activations are in the file
            partial(
                splits.hold_out,
                conditions=_where("perturbation", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAPK1+TGFBR2"),
                val=_where("perturbation", "KLF1+MAP2K6", "MAP2K3+SLC38A2"),
            ),
        ),
        metrics=RANKED,
    ),
)
PERTURBENCH = (
    Task(
        "srivatsan20",
        "drugs on cell lines on which they were not seen (PerturBench)",
        "srivatsan20",
        (partial(splits.transfer, seed=42, fraction=0.3),),
        published=True,
        metrics=RANKED,
        figures=(
            "a549|Ellagic acid",
            "k562|Pirarubicin",
            "k562|SB431542",
            "mcf7|Obatoclax Mesylate (GX15-070)",
            "k562|GSK J1",
            "k562|Tacedinaline (CI994)",
        ),
    ),
    Task(
        "norman19",
        "unseen pairs of activated genes, all single ones known (PerturBench)",
        "norman19",
        (partial(splits.combine, seed=42, fraction=0.7),),
        published=True,
        metrics=RANKED,
    ),
    Task(
        "jiang24",
        "knock-outs in lines and cytokines in which they were not seen (PerturBench)",
        "jiang24",
        (partial(splits.manual, seed=0, fraction=0.7, groups=JIANG_CONTEXTS),),
        split_file="jiang24_split.csv",
        published=True,
        metrics=RANKED,
        figures=("mcf7|INS|DR1", "hap1|IFNG|ZC3H3", "ht29|INS|SP1", "k562|INS|PIK3CA"),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in (*KANG, *OTHERS, *PERTURBENCH)}
