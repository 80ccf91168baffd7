"""Models of others through scvi-tools (the extra ``scvi``): sampled from their priors, as embeddings, as imputation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from invirtuo.nn import SizeFactor

if TYPE_CHECKING:
    from types import ModuleType

    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["COMPARATORS", "embeddings", "posterior_mean", "sample_prior"]

CELLS = 4096  # decoded at once

# takes (module, n, covariates (n, c) or None, size (n, 1)), returns counts (n, g); scANVI always has covariates
Decode: TypeAlias = Callable[..., torch.Tensor]


def sample_prior(
    name: str,
    train: AnnData,
    design: Design,
    labels: pd.DataFrame,
    *,
    epochs: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> AnnData:
    """Train a model of scvi-tools on counts and draw cells of given labels from its prior.

    The latent vector is drawn from N(0, I), in scANVI from the prior of its class. The depth of a cell (in PeakVI its
    factor between 0 and 1) is drawn from a log-normal distribution of those of training cells of the same labels:
    scvi-tools has none by default.

    Parameters
    ----------
    name
        "scvi", "scanvi" or "peakvi".
    train
        Raw counts (for "peakvi" open peaks) in X, with the covariates of the design.
    design
        Its covariates go to encoder and decoder as categories; the first one is the class of scANVI.
    labels
        (n,) rows with the covariates.
    epochs
        Of training; None takes the rule of scvi-tools.
    seed
        Of training and of sampling.
    options
        Of the model class of scvi-tools.

    Returns
    -------
    AnnData with counts (CSR, int32) and `labels`.

    Raises
    ------
    ValueError
        If the name is not known or scvi-tools is not installed.

    References
    ----------
    Lopez et al. 2018, doi:10.1038/s41592-018-0229-2; Xu et al. 2021, doi:10.15252/msb.20209620; Ashuach et al. 2022,
    doi:10.1016/j.crmeth.2022.100182.
    """
    import anndata

    if name not in COMPARATORS:
        raise ValueError(f"unknown comparator {name!r}; known: {', '.join(COMPARATORS)}")
    with _quiet():
        scvi = _scvi()
        scvi.settings.seed = seed
        known = _as_categories(train, list(design.covariates))
        module, decode, depths = COMPARATORS[name](scvi, known, list(design.covariates), epochs, progress, options)
        module.eval()
        counts = _drawn(partial(decode, module), depths, known, design, labels, seed)
    obs = labels[list(design.covariates)].reset_index(drop=True).astype("category")
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    return anndata.AnnData(counts, obs=obs, var=train.var[[]].copy())


def posterior_mean(
    train: AnnData, design: Design, *, cells: AnnData | None = None, epochs: int | None = None, seed: int = 0
) -> np.ndarray:
    """Train scVI on counts and give the mean of every gene, (n, g), of cells at their own total count.

    Parameters
    ----------
    train, design, epochs, seed
        As in :func:`sample_prior`: labels go to encoder and decoder.
    cells
        Cells to give the means of, with labels that training cells have; None takes the training cells.

    References
    ----------
    Lopez et al. 2018, doi:10.1038/s41592-018-0229-2.
    """
    with _quiet():
        scvi = _scvi()
        scvi.settings.seed = seed
        known = _as_categories(train, list(design.covariates))
        model = _scvi_model(scvi, known, list(design.covariates), epochs, False, {})
        wanted = known if cells is None else _as_categories(cells, list(design.covariates))
        shares = model.get_normalized_expression(wanted, library_size=1, return_numpy=True)
    means: np.ndarray = shares * _totals(wanted)[:, None]
    return means


def embeddings(
    adata: AnnData, batch: str, label: str, *, epochs: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Train scVI and, from there, scANVI to take out a batch; latent means of the same cells.

    Parameters
    ----------
    adata
        Raw counts in X.
    batch, label
        Columns of obs; scVI does not see the labels, scANVI does.
    epochs
        Of scVI, the weight of its KL term rising over the first half; None takes the rules of scvi-tools. scANVI goes
        on for a tenth of them.
    seed
        Of training.

    Returns
    -------
    Latent means (n, d) by "scvi" and "scanvi".

    References
    ----------
    Lopez et al. 2018, doi:10.1038/s41592-018-0229-2; Xu et al. 2021, doi:10.15252/msb.20209620.
    """
    with _quiet():
        scvi = _scvi()
        scvi.settings.seed = seed
        known = _as_categories(adata, [batch, label])
        scvi.model.SCVI.setup_anndata(known, batch_key=batch, labels_key=label)
        plan = {} if epochs is None else {"plan_kwargs": {"n_epochs_kl_warmup": max(1, epochs // 2)}}
        first = _train(scvi.model.SCVI(known, gene_likelihood="nb"), epochs, False, **plan)
        found = {"scvi": first.get_latent_representation()}
        second = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category="unknown label")
        _train(second, None if epochs is None else max(1, epochs // 10), False)
        return found | {"scanvi": second.get_latent_representation()}


def _as_categories(adata: AnnData, columns: list[str]) -> AnnData:
    known = adata.copy()
    for column in columns:
        known.obs[column] = known.obs[column].astype(str).astype("category")
    return known


@torch.no_grad()
def _drawn(
    decode: Decode, depths: np.ndarray, known: AnnData, design: Design, labels: pd.DataFrame, seed: int
) -> sparse.csr_matrix:
    """Counts (n, g), CELLS at a time."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    # depths by group of labels
    names, group = np.unique(design.groups(known.obs), return_inverse=True)
    depth = SizeFactor()
    depth.fit(torch.from_numpy(depths.astype(np.float32)), torch.from_numpy(group), len(names))
    wanted = torch.from_numpy(pd.Index(names).get_indexer(design.groups(labels)))
    size = depth.sample(wanted, generator)

    # codes of labels among those of the training cells
    codes = []
    for column in design.covariates:
        categories = known.obs[column].cat.categories
        code = categories.get_indexer(labels[column].astype(str))
        codes.append(torch.from_numpy(code))
    if any(bool((code < 0).any()) for code in codes):
        raise ValueError("labels holds values that no training cell has; expected labels of training cells")

    blocks = []
    for start in range(0, len(labels), CELLS):
        rows = slice(start, start + CELLS)
        covariates = torch.stack([code[rows] for code in codes], dim=1) if codes else None
        x = decode(len(size[rows]), covariates, size[rows, None])
        blocks.append(sparse.csr_matrix(x.cpu().numpy().astype(np.int32)))
    return sparse.vstack(blocks, format="csr")


def _totals(adata: AnnData) -> np.ndarray:
    return np.asarray(adata.X.sum(axis=1), dtype=np.float64).ravel().clip(1)


def _train(model: Any, epochs: int | None, progress: bool, **options: Any) -> Any:
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=progress, logger=False, **options)
    return model


def _scvi_model(
    scvi: ModuleType, adata: AnnData, columns: list[str], epochs: int | None, progress: bool, options: dict[str, Any]
) -> Any:
    scvi.model.SCVI.setup_anndata(adata, categorical_covariate_keys=columns or None)
    options = {"gene_likelihood": "nb", "encode_covariates": True, **options}
    return _train(scvi.model.SCVI(adata, **options), epochs, progress)


def _make_scvi(
    scvi: ModuleType, adata: AnnData, columns: list[str], epochs: int | None, progress: bool, options: dict[str, Any]
) -> tuple[Any, Decode, np.ndarray]:
    model = _scvi_model(scvi, adata, columns, epochs, progress, options)

    def decode(module: Any, n: int, covariates: torch.Tensor | None, size: torch.Tensor) -> torch.Tensor:
        z = torch.randn(n, module.n_latent)
        batch = torch.zeros(n, 1)
        found = module.generative(z=z, library=size.log(), batch_index=batch, cat_covs=covariates)
        counts: torch.Tensor = found["px"].sample()
        return counts

    return model.module, decode, _totals(adata)


def _make_scanvi(
    scvi: ModuleType, adata: AnnData, columns: list[str], epochs: int | None, progress: bool, options: dict[str, Any]
) -> tuple[Any, Decode, np.ndarray]:
    if not columns:
        raise ValueError("scanvi needs a class; give the design a covariate")
    scvi.model.SCVI.setup_anndata(adata, labels_key=columns[0], categorical_covariate_keys=columns[1:] or None)
    first = _train(scvi.model.SCVI(adata, gene_likelihood="nb", **options), epochs, progress)
    model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category="unknown label")
    _train(model, None if epochs is None else max(1, epochs // 10), progress)

    def decode(module: Any, n: int, covariates: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        label = covariates[:, :1]
        mean, variance = module.decoder_z1_z2(torch.randn(n, module.n_latent), label)
        z = mean + variance.sqrt() * torch.randn_like(mean)
        others = covariates[:, 1:] if covariates.shape[1] > 1 else None
        batch = torch.zeros(n, 1)
        found = module.generative(z=z, library=size.log(), batch_index=batch, cat_covs=others)
        counts: torch.Tensor = found["px"].sample()
        return counts

    return model.module, decode, _totals(adata)


def _make_peakvi(
    scvi: ModuleType, adata: AnnData, columns: list[str], epochs: int | None, progress: bool, options: dict[str, Any]
) -> tuple[Any, Decode, np.ndarray]:
    scvi.model.PEAKVI.setup_anndata(adata, categorical_covariate_keys=columns or None)
    options = {"encode_covariates": True, **options}
    model = _train(scvi.model.PEAKVI(adata, **options), epochs, progress)

    def decode(module: Any, n: int, covariates: torch.Tensor | None, size: torch.Tensor) -> torch.Tensor:
        z = torch.randn(n, module.n_latent)
        peaks = module.generative(z=z, qz_m=z, batch_index=torch.zeros(n, 1), cat_covs=covariates)["px"]
        region = torch.sigmoid(module.region_factors) if module.region_factors is not None else 1.0
        return torch.bernoulli((peaks * region * size).clamp(0, 1))

    return model.module, decode, np.asarray(model.get_library_size_factors()).ravel().clip(1e-6)


COMPARATORS = {"scvi": _make_scvi, "scanvi": _make_scanvi, "peakvi": _make_peakvi}


def _scvi() -> Any:
    try:
        import scvi
    except ImportError as error:
        raise ValueError(
            "scvi-tools is not installed; install the extra: pip install -c constraints.txt 'invirtuo[scvi]'"
        ) from error
    return scvi


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages of Lightning and of scvi-tools."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "scvi")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
