"""CountGenerator: base of the models that draw whole populations of cells as counts.

A generator writes `likelihood`: the distribution of the counts of cells of given labels and depths. Drawing labels and
depths, counts, files that are larger than memory, and the growing of rare classes follow from it.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from invirtuo.batch import Batch, Condition
from invirtuo.cells.conditions import Conditions
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import read_h5ad
from invirtuo.cells.multimodal import PEAK
from invirtuo.cells.source import opened
from invirtuo.cells.store import CellStore
from invirtuo.cells.values import check_values, looks_like_counts, require_counts
from invirtuo.errors import preview, whole_number
from invirtuo.fit import FitConfig, noise_seed
from invirtuo.nn import CountLikelihood, SizeFactor
from invirtuo.verbs.draw import check_engine
from invirtuo.verbs.draw_counts import Request, drawn
from invirtuo.verbs.labels import Prior, check_labels, draw, given_labels, observed, rare_counts
from invirtuo.verbs.model import Model, track
from invirtuo.verbs.sampling import takes_options
from invirtuo.verbs.wanted import wanted_conditions
from invirtuo.verbs.write_counts import assembled, write_cells

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["CountGenerator", "Guidance", "check_depths", "counted"]

logger = logging.getLogger(__name__)

STRONG = 3.0  # weights of guidance above this make cells alike (CFGen, table 11)

Guidance = float | Mapping[str, float | Sequence[float]] | None


class CountGenerator(Model):
    """Base of the models that generate raw counts.

    A generator writes `build` (with `self.depth`, a SizeFactor), training, and `likelihood`.
    """

    space = "counts"
    verb = "generate"
    has_latent: ClassVar[bool] = False  # whether cells have latent vectors
    depth: SizeFactor

    def __init__(self, design: Design, genes: Sequence[str], config: Any = None):
        if design.dose or design.time:
            raise ValueError(
                f"{self.name} is conditioned on labels; the design has {design.dose or design.time!r} as a number. "
                "Make it a covariate (as text)"
            )
        peaks = [str(gene).startswith(PEAK) for gene in genes]
        self.n_peaks = sum(peaks)
        if any(peaks[: len(peaks) - self.n_peaks]):
            raise ValueError(f"features that begin with {PEAK!r} must follow the genes; see invirtuo.multimodal.join")
        super().__init__(design, genes, config)

    # ---- what a generator writes --------------------------------------------------------------------------------

    @abstractmethod
    def likelihood(
        self, batch: Batch, weights: Tensor, generator: torch.Generator, config: Any
    ) -> tuple[CountLikelihood, Tensor | None]:
        """The distribution of counts of cells with `batch.condition` and depths `batch.size_factor`; latent vectors.

        `weights` (n, k) or (1, k) are those of guidance, in the order of `design.attributes`.
        """

    # ---- fitting ------------------------------------------------------------------------------------------------

    def fit(
        self, adata: AnnData, split: pd.Series | None = None, config: FitConfig | None = None, **options: Any
    ) -> Self:
        """Fit to the training cells of an AnnData with raw counts in X, or in ``layers["counts"]``.

        Cells without counts are left out, and counted in the log; in files they are an error. Arguments as
        :meth:`Model.fit`.
        """
        self._accelerator = (config or self.fit_config).accelerator  # cells are encoded between the stages
        adata = opened(adata, self.design)
        if isinstance(adata, CellStore):
            return super().fit(adata, split, config, **options)
        adata = counted(adata)
        check_values(adata)

        # cells without counts have no depth
        in_model = adata if list(adata.var_names) == self.genes else adata[:, self.genes]
        has_counts = self._depths(in_model) > 0
        if not has_counts.all():
            n_empty = int((~has_counts).sum())
            logger.warning("%d of %d cells have no counts and are left out", n_empty, len(has_counts))
            if split is not None and len(split) == adata.n_obs:
                split = pd.Series(np.asarray(split), index=adata.obs_names)[has_counts]
            adata = adata[has_counts]
        return super().fit(adata, split, config, **options)

    def prepare(self, dataset: CellDataset) -> None:
        """Learn the distribution of the depth of training cells."""
        rows = dataset.rows("train")
        _, column = self._depth_kind()
        groups = dataset.condition.map(self._groups)[torch.from_numpy(rows)]
        size = self._size(dataset, rows)
        check_depths(size)
        n_groups = len(self.design.covariates[column]) if column else 0
        self.depth.fit(size, groups, n_groups)

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """Combinations of labels among the training cells, with their numbers."""
        obs = dataset.obs.iloc[dataset.rows("train")]
        return {"labels": observed(obs, self.design).to_dict("records")}

    @property
    def n_counted(self) -> int:
        """Number of features that are counts; peaks, which are open or closed, follow them."""
        return len(self.genes) - self.n_peaks

    def _depths(self, adata: AnnData) -> np.ndarray:
        """Total count of every cell; without counted features, the number of open peaks."""
        x = adata.X[:, : self.n_counted] if self.n_counted else adata.X
        return np.asarray(x.sum(axis=1), dtype=np.float64).ravel()

    def _size(self, dataset: CellDataset, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(dataset.totals(rows, self.n_counted))

    def _groups(self, condition: Condition) -> Tensor:
        """(n,) group whose depth is drawn for each cell, -1 for all cells."""
        _, column = self._depth_kind()
        return condition.covariates[column] if column else torch.full((len(condition),), -1)

    def _depth_kind(self) -> tuple[str, str | None]:
        """Kind and column of `config.size_factor`: global, by, by:COLUMN, empirical, empirical:COLUMN."""
        kind, colon, column = self.config.size_factor.partition(":")
        covariates = list(self.design.covariates)
        if kind not in ("global", "by", "empirical") or (colon and kind == "global"):
            raise ValueError(
                f"size_factor is {self.config.size_factor!r}; "
                "expected global, by, by:COLUMN, empirical or empirical:COLUMN"
            )
        if colon and column not in covariates:
            raise ValueError(
                f"size_factor names {column!r}, which is no covariate of the design; "
                f"covariates: {preview(covariates) or 'none'}"
            )
        return kind, column or (covariates[0] if kind == "by" and covariates else None)

    def make_depth(self) -> SizeFactor:
        """The distribution of depth that `config.size_factor` names."""
        kind, _ = self._depth_kind()
        return SizeFactor(empirical=kind == "empirical")

    def _check_space(self, adata: AnnData) -> None:
        require_counts(adata)
        if isinstance(adata, CellStore):
            manifest = adata.manifest
            holds_counts = adata.scan().whole if manifest is None else manifest.get("values") == "counts"
            if not holds_counts:
                raise ValueError("the files hold values that are not whole numbers; prepare them with --counts")
            return
        values = adata.X.data if sparse.issparse(adata.X) else np.asarray(adata.X)
        broken = int((values != np.rint(values)).sum())
        if broken:
            raise ValueError(f"X holds {broken:,} values that are not whole numbers; expected raw counts")

    # ---- generating ---------------------------------------------------------------------------------------------

    @takes_options()
    @torch.no_grad()
    def generate(
        self,
        n_cells: int | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        labels: pd.DataFrame | None = None,
        prior: Prior = "joint",
        size_factor: float | Sequence[float] | None = None,
        output: Literal["counts", "mean", "both"] = "counts",
        latent: bool = False,
        seed: int = 0,
        out: str | Path | None = None,
        chunk_size: int = 8192,
        engine: str = "local",
        n_jobs: int | None = None,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Draw cells.

        Parameters
        ----------
        n_cells
            How many; may be left out with `labels`.
        where
            Attribute (column of the Design) to a label for all cells, or to a list of one label per cell.
        labels
            The same as a table with one row per cell.
        prior
            How attributes that are not given are drawn: "joint" (observed proportions of the combinations that agree
            with what is given), "independent", or "uniform" (all observed combinations alike).
        size_factor
            Total count of the cells, a number or one per cell; None draws it from the distribution of training cells.
        output
            What X holds: "counts" (CSR, int32), "mean" (dense float32), or "both": counts, and ``layers["mean"]``.
        latent
            Keep the latent vectors in ``obsm["z"]``, of models that have them.
        seed
            Same seed, same cells, whatever the device and the chunk size.
        out
            h5ad to write while cells are drawn; memory then does not grow with their number. Needs output="counts".
        chunk_size
            Cells between two writes. The cells do not depend on it.
        engine, n_jobs
            "local" draws in this process. "ray" spreads the cells over the Ray cluster of this session or of
            ``RAY_ADDRESS``, or over `n_jobs` processes of this machine: the same cells; those of a lost worker are
            drawn again.
        device
            As in :meth:`PerturbationModel.predict`.
        progress
            Show a progress bar.
        {options}

        Returns
        -------
        AnnData; obs has the attributes that were asked for or guided, and ``size_factor``. With `out` it reads from
        the file (backed).

        Raises
        ------
        ValueError
            If the model is not fitted, a label, attribute or option is not known, or an option cannot act.
        """
        self._check_fitted()
        check_engine(engine, n_jobs)
        self._check_output(output, latent, out)
        whole_number("chunk_size", chunk_size)
        sampling = self._sampling(options)

        # labels, depths and weights of guidance of all cells
        given = self._given(n_cells, where, labels)
        guidance = options.get("guidance")
        request = self._request(given, prior, guidance, size_factor, whole_number("seed", seed, 0))
        if "guidance" in options:
            # the request holds the weights of every cell
            sampling = replace(sampling, guidance=_mean_guidance(guidance))
        request = replace(request, config=sampling, means=output != "counts", device=device)

        # what is drawn goes into memory or into a file as it comes
        blocks = track(drawn(self, request, engine, n_jobs), "generating", progress, len(request))
        obs = self._generated_obs(request, given.columns)
        uns = self._provenance(seed, sampling)
        uns |= {"guidance": json.dumps(_mean_guidance(guidance)), "prior": prior}
        if out is not None:
            write_cells(Path(out), obs, self._var(), uns, blocks, chunk_size, latent)
            return read_h5ad(out, backed=True)
        return assembled(list(blocks), obs, self._var(), uns, output, latent)

    def _check_output(self, output: str, latent: bool, out: str | Path | None) -> None:
        """Refuse outputs that do not exist, cannot be written in pieces, or that the model has not got."""
        if output not in ("counts", "mean", "both"):
            raise ValueError(f"output is {output!r}; expected counts, mean or both")
        if out is not None and output != "counts":
            raise ValueError(f"output is {output!r}; a file is written in pieces only for output='counts'")
        if latent and not self.has_latent:
            raise ValueError(f"{self.name} has no latent vectors; leave latent= out")

    @takes_options()
    def predict(
        self,
        conditions: Conditions,
        n_cells: int = 1000,
        *,
        seed: int = 0,
        output: Literal["counts"] = "counts",
        out: str | Path | None = None,
        engine: str = "local",
        n_jobs: int | None = None,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Draw `n_cells` for each condition, as counts: :meth:`generate` in the words of `PerturbationModel.predict`.

        Parameters
        ----------
        conditions, n_cells, seed, out, engine, n_jobs, device, progress
            As in :meth:`PerturbationModel.predict`.
        output
            "counts", which is what the model draws.
        {options}

        Returns
        -------
        AnnData as of :meth:`generate`.
        """
        self._check_fitted()
        if output != "counts":
            raise ValueError(f"output is {output!r}; {self.name} draws counts, leave output out")
        table = wanted_conditions(conditions, self)
        n_cells = whole_number("n_cells", n_cells)
        rows = table.loc[table.index.repeat(n_cells)].reset_index(drop=True)
        where_drawn: dict[str, Any] = {"engine": engine, "n_jobs": n_jobs, "device": device}
        return self.generate(labels=rows, seed=seed, out=out, progress=progress, **where_drawn, **options)

    @property
    def _table(self) -> pd.DataFrame:
        return pd.DataFrame(self.card["labels"])

    def _given(self, n_cells: int | None, where: Mapping[str, Any] | None, labels: pd.DataFrame | None) -> pd.DataFrame:
        """(n,) labels that were asked for, checked."""
        if labels is not None and not isinstance(labels, pd.DataFrame):
            raise ValueError(f"labels is a {type(labels).__name__}; expected a DataFrame with one row per cell")
        n = len(labels) if n_cells is None and labels is not None else n_cells
        if n is None or n < 1:
            raise ValueError(f"n_cells is {n}; expected at least 1")

        # one table of what `where` and `labels` give
        columns: dict[str, Any] = dict(where or {})
        labels = pd.DataFrame() if labels is None else labels
        for name in labels.columns:
            if name in columns:
                raise ValueError(f"{name!r} is in both `where` and `labels`; give it once")
            columns[name] = labels[name].where(labels[name].notna(), self.design.unknown).tolist()
        given = given_labels(columns, n)

        # labels in the words of the design, all of them known
        for column in given.columns.intersection(self.design.attributes):
            given[column] = [self.design.value(column, label) for label in given[column]]
        covariates = given.drop(columns=self.design.perturbation or [], errors="ignore")
        check_labels(covariates, self._table, self.design.unknown)
        self._check_perturbations(given)
        return given

    def _check_perturbations(self, given: pd.DataFrame) -> None:
        """Perturbations must have been trained on, alone or in combinations; or the Design has features."""
        if self.design.perturbation not in given.columns:
            return
        asked: set[str] = set()
        for label in given[self.design.perturbation].unique():
            asked |= set(self.design.parts(label))
        trained = set(self.design.perturbations if self.takes_unseen else self.card["perturbations"])
        if unknown := sorted(asked - trained):
            raise ValueError(
                f"{self.design.perturbation}: {preview(unknown)} do not occur in the training cells; "
                f"known: {preview(trained, 50)}"
            )

    def _request(self, given: pd.DataFrame, prior: Prior, guidance: Guidance, size_factor: Any, seed: int) -> Request:
        """Complete labels, depths and weights."""
        rng = np.random.default_rng([seed, 1])
        labels = draw(self._table, given, rng, prior=prior, unknown=self.design.unknown)
        weights = self._weights(guidance, len(labels))
        size = self._sizes(labels, size_factor, seed)
        return Request(labels, size, weights, seed)

    def _sizes(self, labels: pd.DataFrame, size_factor: Any, seed: int) -> Tensor:
        """(n,) depths: drawn, or as they are given."""
        if size_factor is None:
            groups = self._groups(self.design.encode(labels))
            generator = torch.Generator().manual_seed(noise_seed(seed, 2))
            return self.depth.sample(groups, generator).float()
        size = torch.as_tensor(np.asarray(size_factor, dtype=np.float32)).expand(len(labels)).clone()
        if not bool((size > 0).all()) or not bool(size.isfinite().all()):
            raise ValueError("size_factor holds values that are not above 0; expected the total count of each cell")
        return size

    def _weights(self, guidance: Guidance, n: int) -> Tensor:
        """(n, k) or (1, k) weights in the order of `design.attributes`."""
        # a weight for every attribute
        names = self.design.attributes
        is_given = guidance is not None
        if not isinstance(guidance, Mapping):
            guidance = dict.fromkeys(names, 1.0 if guidance is None else float(guidance))
        if unknown := [name for name in guidance if name not in names]:
            raise ValueError(
                f"guidance: {preview(unknown)} is not an attribute of this model; its attributes: {preview(names)}"
            )

        # and for every cell
        weights = torch.zeros(n, len(names))
        for i, name in enumerate(names):
            weight = np.asarray(guidance.get(name, 0.0), np.float32)
            weights[:, i] = torch.from_numpy(np.broadcast_to(weight, (n,)).copy())
        if not bool(weights.isfinite().all()):
            raise ValueError("guidance holds values that are not finite; expected numbers")
        if is_given:
            self._check_null(weights)
        if bool((weights > STRONG).any() or (weights < 0).any()):
            logger.warning(
                "weights of guidance above %g, or below 0, make cells alike or strange; look at them", STRONG
            )
        return weights[:1] if bool((weights == weights[:1]).all()) else weights

    def _check_null(self, weights: Tensor) -> None:
        """Refuse weights of guidance for which cells without labels matter, where none were learned."""

    def _generated_obs(self, request: Request, given: Sequence[str]) -> pd.DataFrame:
        """Table of the labels that the cells were drawn for, and of their depths."""
        used = (request.weights != 0).any(dim=0).tolist()
        names = [name for name, use in zip(self.design.attributes, used, strict=True) if use or name in given]
        obs = request.labels[names].astype("category").assign(size_factor=request.size.numpy())
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        return obs

    def _var(self) -> pd.DataFrame:
        var = pd.DataFrame(index=pd.Index(self.genes))
        if self.n_peaks:
            var["modality"] = ["rna"] * self.n_counted + ["atac"] * self.n_peaks
        return var

    # ---- augmenting ---------------------------------------------------------------------------------------------

    @takes_options()
    def augment(
        self,
        adata: AnnData,
        by: str,
        target_size: int,
        *,
        power: float = 1.0,
        max_fold: float | None = None,
        min_cells: int = 20,
        split: pd.Series | None = None,
        check_copies: bool = False,
        prior: Prior = "joint",
        size_factor: float | Sequence[float] | None = None,
        seed: int = 0,
        engine: str = "local",
        n_jobs: int | None = None,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Add generated cells to real ones until there are `target_size`, more of the classes with few cells.

        Parameters
        ----------
        adata
            Real cells with raw counts, among them the training cells; not changed.
        by
            Attribute whose rare classes grow.
        target_size
            Real and generated cells in all.
        power, max_fold
            Shares are proportional to (cells of the class)^(-power); at most `max_fold` generated cells for a real one.
        min_cells
            Classes with fewer real cells are named in the log: what is generated for them may copy these cells.
        split
            As for fit: only "train" cells are taken. None takes all.
        check_copies
            Compare generated cells with the training cells nearest to them (:func:`invirtuo.metrics.copying`), beside
            the other real cells of the split; the table is in ``uns["invirtuo"]["copying"]``.
        prior, size_factor, seed, engine, n_jobs, device, progress
            As in :meth:`generate`.
        {options}

        Returns
        -------
        AnnData with the real cells first, ``obs["is_generated"]``, ``uns["invirtuo"]["augmented"]``, cells of each
        class, and ``uns["invirtuo"]["resemblance"]`` (:func:`invirtuo.metrics.resemblance`): classes whose generated
        cells are unlike their real ones are named in the log, too.

        References
        ----------
        CFGen, arXiv:2407.11734, section 5.4.
        """
        import anndata

        self._check_fitted()
        if by not in self.design.attributes:
            raise ValueError(
                f"by={by!r} is not an attribute of this model; its attributes: {preview(self.design.attributes)}"
            )

        # sizes of the classes, and how far each shall grow
        all_real = self._with_genes(counted(adata))
        is_train = np.ones(adata.n_obs, bool)
        if split is not None:
            is_train = split.reindex(adata.obs_names).to_numpy() == "train"
        real = all_real[is_train]
        sizes = self.design.tidy(real.obs)[by].value_counts()
        sizes = sizes[sizes.index != self.design.unknown]
        if target_size <= real.n_obs:
            raise ValueError(
                f"target_size is {target_size}, and there are {real.n_obs} cells; expected more than these"
            )
        n_new = target_size - real.n_obs
        counts = rare_counts(sizes.to_dict(), n_new, power=power, max_fold=max_fold)
        if few := [name for name, size in sizes.items() if size < min_cells and counts[name]]:
            logger.warning("%s: fewer than %d real cells; generated ones may copy them", preview(few), min_cells)

        # cells that are drawn for them
        labels = pd.DataFrame({by: np.repeat([*counts], [*counts.values()])})
        generated = self.generate(
            labels=labels,
            prior=prior,
            size_factor=size_factor,
            seed=seed,
            engine=engine,
            n_jobs=n_jobs,
            device=device,
            progress=progress,
            **options,
        )
        generated.obs_names = [f"generated_{i}" for i in range(generated.n_obs)]

        # real cells first
        counts_of_real = sparse.csr_matrix(real.X).astype(np.int32)
        real_alone = anndata.AnnData(counts_of_real, obs=real.obs.copy(), var=self._var())
        alike = self._resemblance(generated, real_alone, by)
        both = anndata.concat([real_alone, generated], join="outer")
        both.obs["is_generated"] = np.arange(both.n_obs) >= real.n_obs
        facts = {"augmented": json.dumps(counts), "by": by, "resemblance": alike}
        both.uns["invirtuo"] = generated.uns["invirtuo"] | facts
        if check_copies:
            from invirtuo.metrics import copying  # imports all of SciPy's optimisation and statistics

            others = None if is_train.all() else all_real[~is_train]
            both.uns["invirtuo"]["copying"] = copying(generated, real, others, by=by)
        return both

    def _resemblance(self, generated: AnnData, real: AnnData, by: str) -> pd.DataFrame:
        """How like real cells of their class generated ones are; classes that are not are named in the log."""
        from invirtuo.metrics import resemblance  # imports all of SciPy's optimisation and statistics

        label = self.design.tidy(real.obs)[by]
        known = real[(label != self.design.unknown).to_numpy()]
        known.obs = known.obs.assign(**{by: label})
        table = resemblance(generated, known, by=by, n_pcs=min(30, known.n_obs - 1, known.n_vars - 1))
        for _, row in table[table["unlike"]].iterrows():
            logger.warning(
                "%s: %.2f of the generated cells are nearest to the real cells of their class, of the real ones %.2f; "
                "look at them before you add them",
                *(row[by], row["generated"], row["real"]),
            )
        return table


def counted(adata: AnnData) -> AnnData:
    """The cells with raw counts in X: X itself, or the layer "counts" that :func:`preprocess.normalize` writes."""
    import anndata

    if "counts" not in adata.layers or looks_like_counts(adata.X):
        return adata
    return anndata.AnnData(adata.layers["counts"], obs=adata.obs, var=adata.var[[]])


def check_depths(size: Tensor) -> None:
    """Refuse training cells without counts; `fit` leaves them out where cells are in memory."""
    if not bool((size > 0).all()):
        raise ValueError(f"{int((size <= 0).sum())} training cells have no counts; remove them from the files")


def _mean_guidance(guidance: Guidance) -> Any:
    """Weights of guidance with one number per attribute, for JSON: of weights per cell the mean."""
    if not isinstance(guidance, Mapping):
        return guidance
    return {name: float(np.mean(weight)) for name, weight in guidance.items()}
