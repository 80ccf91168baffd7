"""Generators that flow from noise to a latent space and decode it: training in two stages, correction, imputation.

First the autoencoder is trained; then latent vectors of all cells are computed once, standardised, and the flow is
trained on them. Latent vectors are standardised inside of this module and on the autoencoder's scale outside.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.errors import preview
from invirtuo.fit import FitConfig, noise_seed
from invirtuo.flow import PathSample, composed, exact_coupling, reversed_time, solve
from invirtuo.flow.solve import Velocity
from invirtuo.nn import CountLikelihood, LabelEmbedding, ResidualVelocity
from invirtuo.verbs.generate import CountGenerator, Guidance, counted
from invirtuo.verbs.masking import ImputedLayer
from invirtuo.verbs.model import track
from invirtuo.verbs.sampling import ADAPTIVE, SolverSampling, takes_options

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.values import AnyMatrix
    from invirtuo.design import Design

__all__ = ["ConditionalFlow", "LatentFlow"]

logger = logging.getLogger(__name__)

FIT = FitConfig(  # of our presets
    steps=6000,
    batch_size=256,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=1e-5,
    clip=1.0,
    val_every=100,
    keep="best",
    patience=5,
)
CHUNK = 2048  # cells encoded at once
ROUND_TRIP = 50  # steps to noise, and back
NOISE, DRAWS = 0.05, 10  # of impute: jitter, and how many of them are averaged
REFIT_CELLS, REFIT_STEPS = 2048, 40  # of the dispersions
REFIT_SD = 2.0  # how far the logarithm of a dispersion may be expected to move
NULL = "(not known)"  # stands for labels that the model was not trained on, where its Design has no word for them
COLLAPSE = 2.0  # weights above this make batches mix because cells become alike (CFGen, table 11)


class ConditionalFlow(nn.Module):
    """Velocity network and embeddings of labels: what the second stage trains."""

    def __init__(self, velocity: ResidualVelocity, labels: LabelEmbedding):
        super().__init__()
        self.velocity, self.labels = velocity, labels

    def forward(self, z: Tensor, t: Tensor, size: Tensor, condition: Condition, active: Tensor) -> Tensor:
        """z (n, d), t (n,), scaled depth (n,), labels and which of them count (n, k) -> (n, d)."""
        velocity: Tensor = self.velocity(z, t, size, self.labels(condition, active))
        return velocity


class LatentFlow(CountGenerator):
    """Base of the generators with an autoencoder and a latent flow.

    A model writes `build`, which makes `autoencoder` (with `encode(x)`, `decode(z, size, condition)` to a
    CountLikelihood, and a Dispersion), `flow`, `depth` and, by :meth:`add_scale`, the scale of the latent vectors; and
    `path`.
    """

    Sampling = SolverSampling
    autoencoder: Any
    takes_features = True
    has_latent = True
    flow: ConditionalFlow
    n_latent: int
    latent_mean: Tensor
    latent_sd: Tensor

    @abstractmethod
    def path(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathSample:
        """Point and velocity between noise and latent vectors."""

    def add_scale(self, n_latent: int) -> None:
        """Make room for mean and standard deviation of the latent vectors."""
        self.n_latent = n_latent
        self.register_buffer("latent_mean", torch.zeros(n_latent))
        self.register_buffer("latent_sd", torch.ones(n_latent))

    # ---- training -----------------------------------------------------------------------------------------------

    def stages(self, config: FitConfig) -> dict[str, FitConfig]:
        """Autoencoder, then flow; `autoencoder_share` of the steps, and `flow_lr` times the learning rate."""
        first = min(max(round(config.steps * self.config.autoencoder_share), 1), max(config.steps - 1, 1))
        flow = replace(config, steps=max(config.steps - first, 1), lr=config.lr * self.config.flow_lr)
        return {"autoencoder": replace(config, steps=first), "flow": flow}

    def stage_data(self, stage: str, dataset: CellDataset) -> CellDataset:
        """Counts for the autoencoder; standardised latent vectors and depths for the flow.

        Without validation cells, `val_share` of the training cells are set aside: both stages would
        overfit unnoticed.
        """
        dataset = dataset if len(dataset.rows("val")) else dataset.with_validation(self.config.val_share)
        if stage != "flow":
            self._start_dispersions(dataset)
            return dataset
        if getattr(self.config, "refit_dispersion", False) and self.n_counted:
            self._refit_dispersions(dataset)
        self.latent_mean.zero_()
        self.latent_sd.fill_(1.0)
        z = self._encoded(dataset)
        if self.config.latent_scaling == "standard":
            train = z[torch.from_numpy(dataset.rows("train"))]
            self.latent_mean = train.mean(dim=0)
            self.latent_sd = train.std(dim=0, correction=0).clamp_min(1e-6)
        size = self._size(dataset, np.arange(len(z)))
        return dataset.with_values((z - self.latent_mean) / self.latent_sd, size)

    def _start_dispersions(self, dataset: CellDataset) -> None:
        """Start at the dispersions of all training cells pooled: a lower bound, nearer than a random start."""
        if self.n_counted:
            overdispersion = dataset.overdispersion()[: self.n_counted]
            self.autoencoder.dispersion.start(torch.from_numpy(overdispersion))

    def _refit_dispersions(self, dataset: CellDataset) -> None:
        """Maximise the likelihood of validation cells over the dispersions alone, cells encoded as they will be.

        While it is trained the encoder does not see a part of its input, and what it cannot know counts as dispersion.
        Genes of which these cells say little stay near where they were.
        """
        dispersion, rows = self.autoencoder.dispersion, dataset.rows("val")
        if not len(rows):
            return
        rows = rows[:: -(-len(rows) // REFIT_CELLS)]
        self.eval()
        chunks = []
        with torch.no_grad():
            for start in range(0, len(rows), 256):
                batch = dataset.take(rows[start : start + 256]).to(dispersion.weight.device)
                cells = self.autoencoder.decode(
                    self.autoencoder.encode(batch.target), self.total(batch.target), batch.condition
                )
                chunks.append((batch, cells.log_mean))

        # every entry is a problem of its own: steps of the size and sign that suit it
        learned = dispersion.weight.detach().clone()
        dispersion.weight.requires_grad_(True)
        optimizer = torch.optim.Rprop([dispersion.weight], lr=0.3 / dispersion.speed)
        for _ in range(REFIT_STEPS):
            optimizer.zero_grad()
            (0.5 * (dispersion.speed * (dispersion.weight - learned) / REFIT_SD).square().sum()).backward()
            for batch, log_mean in chunks:
                counts = batch.target[:, : self.n_counted]
                cells = CountLikelihood(log_mean, self.autoencoder.dispersions(batch.condition))
                (-cells.log_prob_genes(counts).sum()).backward()
            optimizer.step()
        dispersion.weight.requires_grad_(False)
        optimizer.zero_grad()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of the stage that is being trained; outside of a fit, of both."""
        if self.stage == "flow":
            return {"total": self.flow_loss(batch.target, batch.condition, batch.size_factor)}
        x = batch.target
        size = self.total(x)
        z = self.autoencoder.encode(x)
        losses = self.reconstruction_losses(x, z, size, batch.condition)
        if self.stage == "autoencoder":
            return losses
        # the flow does not train the autoencoder
        standard = (z.detach() - self.latent_mean) / self.latent_sd
        flow = self.flow_loss(standard, batch.condition, size)
        return losses | {"total": losses["total"] + flow, "flow": flow}

    def reconstruction_losses(self, x: Tensor, z: Tensor, size: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Negative log likelihood, summed over features and averaged over cells; "per_feature" compares data sets."""
        cells = self.autoencoder.decode(z, size, condition)
        losses = {}
        if self.n_counted:
            losses["rna"] = -cells.log_prob_genes(x[:, : self.n_counted]).mean()
        if self.n_peaks:
            losses["atac"] = -cells.log_prob_peaks(x[:, self.n_counted :]).mean()
        total = sum(losses.values())
        single = losses if len(losses) > 1 else {}
        return single | {"total": total, "per_feature": total.detach() / len(self.genes)}

    def flow_loss(self, z1: Tensor, condition: Condition, size: Tensor) -> Tensor:
        """Mean squared error of the velocity at random times; labels are drawn for every cell anew."""
        z0 = torch.randn_like(z1)
        if self.config.coupling == "ot":
            z0 = z0[self._couple(z0, z1, condition)]
        t = self._random_times(len(z1), z1.device)
        point = self.path(z0, z1, t)
        velocity = self.flow(point.xt, t, self._scaled(size), condition, self.drawn_labels(condition))
        loss: Tensor = (velocity - point.ut).square().mean()
        return loss

    def _random_times(self, n: int, device: torch.device) -> Tensor:
        """(n,) times between 0 and 1; stratified, they are evenly spaced from a random start."""
        if not self.config.stratified:
            return torch.rand(n, device=device)
        start = torch.rand(1, device=device)
        return (start + torch.arange(n, device=device) / n) % 1

    def drawn_labels(self, condition: Condition) -> Tensor:
        """(n, k) which attributes each cell is conditioned on: none with `prob_unconditional`, else one, or all.

        References
        ----------
        CFGen, algorithm 1, for every cell by itself.
        """
        known = self.flow.labels.known(condition)
        keep = torch.rand(len(known), 1, device=known.device) >= self.config.prob_unconditional
        kept: Tensor = known & keep
        if self.config.conditioning == "joint" or not known.shape[1]:
            return kept
        score = torch.rand(known.shape, device=known.device).masked_fill(~known, -1.0)
        single: Tensor = F.one_hot(score.argmax(dim=1), known.shape[1]).bool() & kept
        return single

    def _couple(self, z0: Tensor, z1: Tensor, condition: Condition) -> Tensor:
        """Row of the noise that is coupled to each latent vector; noise alone is permuted, labels stay."""
        if not self.config.ot_within_class:
            return exact_coupling(z1, z0).to(z1.device)
        group = _classes(condition)
        rows = torch.arange(len(z1), device=z1.device)
        for k in group.unique():
            members = (group == k).nonzero().flatten()
            order = exact_coupling(z1[members], z0[members])
            rows[members] = members[order.to(z1.device)]
        return rows

    def total(self, x: Tensor) -> Tensor:
        """(n,) total count of cells (n, g); without counted features, the number of open peaks."""
        return (x[:, : self.n_counted] if self.n_counted else x).sum(dim=1)

    def _scaled(self, size: Tensor) -> Tensor:
        return self.depth.scaled(size).clamp(-0.1, 1.1)

    # ---- flow and its inverse -----------------------------------------------------------------------------------

    def field(self, condition: Condition, size: Tensor, weights: Tensor) -> Velocity:
        """Guided velocity (n, d) of standardised latent vectors of cells with these labels and depths.

        Parameters
        ----------
        weights
            (n, k) or (1, k), weight of every attribute; with `conditioning="joint"` the first one is that of all.
        """
        joint = self.config.conditioning == "joint"
        if joint and bool((weights != weights[:, :1]).any()):
            raise ValueError('with conditioning="joint" all attributes have one weight; give guidance as a number')
        scaled = self._scaled(size)
        n_labels = self.flow.labels.n_attributes

        def velocity(z: Tensor, t: Tensor, cell: Tensor, branch: Tensor) -> Tensor:
            # branch 0 has no labels; branch i the i-th attribute, or all
            if joint:
                active = (branch[:, None] == 1).expand(-1, n_labels)
            else:
                active = branch[:, None] == torch.arange(1, n_labels + 1, device=z.device)
            time = torch.full((len(z),), float(t), device=z.device)
            flow: Tensor = self.flow(z, time, scaled[cell], condition[cell], active)
            return flow

        return composed(velocity, weights[:, :1] if joint else weights)

    def likelihood(
        self, batch: Batch, weights: Tensor, generator: torch.Generator, config: SolverSampling
    ) -> tuple[CountLikelihood, Tensor]:
        """Integrate from noise and decode."""
        z0 = torch.randn(len(batch), self.n_latent, generator=generator).to(batch.size_factor.device)
        z = self._solved(self.field(batch.condition, batch.size_factor, weights), z0, config)
        z = z * self.latent_sd + self.latent_mean
        return self.autoencoder.decode(z, batch.size_factor, batch.condition), z

    def _solved(self, field: Velocity, z0: Tensor, config: SolverSampling) -> Tensor:
        return solve(field, z0, config.steps or self.config.steps, config.solver or self.config.solver)

    @takes_options()
    @torch.no_grad()
    def check_solver(self, n_cells: int = 256, *, seed: int = 0, **options: Any) -> dict[str, float]:
        """How far the solver is from dopri5 with tolerance 1e-5, from the same noise.

        Parameters
        ----------
        n_cells, seed
            As in :meth:`generate`.
        {options}

        Returns
        -------
        Largest and mean absolute difference of standardised latent vectors, and the 2-Wasserstein distance between the
        two sets of cells.
        """
        self._check_fitted()
        sampling = self._sampling(options)
        given = self._given(n_cells, None, None)
        request = self._request(given, "joint", options.get("guidance"), None, seed)
        field = self.field(self.design.encode(request.labels), request.size, request.weights)

        # both solvers from the same noise
        generator = torch.Generator().manual_seed(noise_seed(seed, 4))
        z0 = torch.randn(n_cells, self.n_latent, generator=generator)
        fast = self._solved(field, z0, sampling)
        exact = solve(field, z0, 1, "dopri5")
        difference = (fast - exact).abs()
        nearest = exact[exact_coupling(fast, exact)]
        distance = (fast - nearest).square().sum(dim=1).mean().sqrt()
        return {"max": float(difference.max()), "mean": float(difference.mean()), "wasserstein2": float(distance)}

    # ---- verbs --------------------------------------------------------------------------------------------------

    @takes_options()
    def embed(self, adata: AnnData, *, device: str | None = None) -> AnnData:
        """Encode cells; their labels are not looked at, and need not be there.

        Parameters
        ----------
        adata
            Raw counts in X, or in ``layers["counts"]``.
        device
            As in :meth:`PerturbationModel.predict`.

        Returns
        -------
        AnnData with latent vectors (n, d) in X and the obs of the given cells.
        """
        import anndata

        z = self._encoded(self._dataset(adata, labelled=False), device)
        var = pd.DataFrame(index=[f"latent_{i}" for i in range(self.n_latent)])
        return anndata.AnnData(z.numpy(), obs=adata.obs.copy(), var=var, uns={"invirtuo": self._made_by("embed")})

    @takes_options()
    @torch.no_grad()
    def correct(
        self,
        adata: AnnData,
        batch: str,
        *,
        reference: str | None = None,
        invert_with: Literal["own", "unconditional"] = "own",
        invert_guidance: Guidance = None,
        output: Literal["mean", "counts"] | None = None,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Take cells to noise under their own labels, and back as cells of one reference batch.

        The other labels (cell types) are needed and are used: scores by these labels flatter the result. Labels that no
        training cell has, a new batch too, count as not known, with a warning: these cells flow without them.

        Parameters
        ----------
        adata
            Raw counts, with the columns of the Design.
        batch
            Covariate whose effect is taken out.
        reference
            Label of the batch that all cells are brought to; None takes the one with most training cells.
        invert_with
            "own": labels of the cell on the way to noise; "unconditional": none.
        invert_guidance
            Weights of the own labels on the way to noise, in the words of `guidance`, which is the way back; None is 1
            for every attribute. The same weights both ways map each type and batch onto itself: what a larger
            `guidance` adds shows only against the weights of the way there.
        output
            "mean" or "counts" also decodes the corrected cells, with their own depths.
        seed
            Of the counts that are drawn, with output="counts".
        device, progress
            As in :meth:`generate`.
        {options}
            Here 50 steps by default; weights of guidance in the paper: 1 or 2. Larger ones mix batches by making cells
            alike.

        Returns
        -------
        Copy of `adata` with ``obsm["X_invirtuo"]``, corrected latent vectors (n, d); ``layers["corrected"]`` if asked
        for, where genes that the model does not know stay as they are; and ``uns["invirtuo"]["collapse"]``, the
        variance within labels and batches after over before: far below 1, cells have become alike.

        References
        ----------
        CFGen, arXiv:2407.11734, section 5.5 and appendix G.7.
        """
        self._check_fitted()
        config = self._round_trip(options)
        dataset = self._dataset(adata)
        target = self._reference(batch, reference)

        # weights of guidance on the way back, and on the way to noise
        weights = self._weights(options.get("guidance"), adata.n_obs)
        if bool((weights > COLLAPSE).any()):
            logger.warning(
                "weights above %g mix batches by making cells alike; look at uns['invirtuo']['collapse']", COLLAPSE
            )
        inverse_weights = self._inverse_weights(invert_with, invert_guidance, adata.n_obs)

        # the same cells under their own labels, and under the label of the reference
        size = self._size(dataset, np.arange(adata.n_obs))
        z = (self._encoded(dataset, device) - self.latent_mean) / self.latent_sd
        own = dataset.condition[:]
        reference_codes = torch.full_like(own.covariates[batch], target)
        other = replace(own, covariates={**own.covariates, batch: reference_codes})

        # to noise and back
        corrected = torch.empty_like(z)
        with self.on_device(device) as chosen:
            for rows in track(_chunks(len(z)), "correcting", progress):
                depth = size[rows].to(chosen)
                backward = self.field(own[rows].to(chosen), depth, _rows(inverse_weights, rows).to(chosen))
                forward = self.field(other[rows].to(chosen), depth, _rows(weights, rows).to(chosen))
                noise = self._solved(reversed_time(backward), z[rows].to(chosen), config)
                corrected[rows] = self._solved(forward, noise, config).cpu()

        # what comes back: latent cells, counts if asked for, and how much more alike the cells became
        new = adata.copy()
        latent = corrected * self.latent_sd + self.latent_mean
        new.obsm["X_invirtuo"] = latent.numpy()
        if output is not None:
            new.layers["corrected"] = self._decoded_layer(adata, latent, size, other, output, seed)
        facts = {"batch": batch, "reference": self.design.covariates[batch][target]}
        collapse = _collapse(z, corrected, _classes(own))
        new.uns["invirtuo"] = self._made_by("correct") | facts | {"collapse": collapse}
        return new

    def _inverse_weights(self, invert_with: str, guidance: Guidance, n: int) -> Tensor:
        """(n, k) or (1, k) weights of the own labels on the way to noise."""
        if invert_with not in ("own", "unconditional"):
            raise ValueError(f"invert_with is {invert_with!r}; expected own or unconditional")
        if invert_with == "own":
            return self._weights(guidance, n)
        if guidance is not None:
            raise ValueError(
                "invert_guidance weighs the own labels, which invert_with='unconditional' leaves out; give one of them"
            )
        weights = torch.zeros_like(self._weights(None, n))
        self._check_null(weights)
        return weights

    @takes_options(sampling=SolverSampling)
    @torch.no_grad()
    def impute(
        self,
        adata: AnnData,
        *,
        mask: Any = None,
        masked_fraction: float = 0.0,
        noise: float = NOISE,
        n_draws: int = DRAWS,
        conditional: bool = True,
        flow: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Fill in counts that were not measured: encode, decode; with `flow`, by way of noise.

        The result is a mean under the model, not a measurement. Give cells that the model was not fitted to: in those
        that it was, entries that are missing were zeros to learn.

        Parameters
        ----------
        adata
            Raw counts in which missing entries are 0.
        mask
            (n, g) bool, dense or sparse: the missing entries; None fills in nothing but gives the means of all.
        masked_fraction
            Share of each cell's counts that is missing: its depth is raised by 1 / (1 - masked_fraction).
        flow
            True takes the encoded cell to noise, jitters it, comes back and averages, as in the paper. It gave the
            same numbers at a hundred times the cost (docs/results/generation.md). None: if one of its options is given.
        noise
            Standard deviation of the jitter; above 0.1 it becomes another cell.
        n_draws
            Jittered copies that are averaged.
        conditional
            Flow under the labels of the cell, those that are known; else without labels.
        seed
            Of the jitter.
        device, progress
            As in :meth:`generate`.
        {options}
            Here 50 steps by default.

        Returns
        -------
        Copy of `adata` with ``layers["imputed"]``: with a mask, X (CSR) with means at the masked entries; without,
        means of all entries (dense float32).

        References
        ----------
        CFGen, arXiv:2407.11734, appendix I.6.
        """
        self._check_fitted()
        if not 0 <= masked_fraction < 1 or noise < 0 or n_draws < 1:
            raise ValueError(
                f"masked_fraction={masked_fraction}, noise={noise}, n_draws={n_draws}; expected a fraction below 1, "
                "noise of at least 0 and at least one draw"
            )
        is_told = bool(options) or (noise, n_draws, conditional) != (NOISE, DRAWS, True)
        if is_told and flow is False:
            raise ValueError(
                "flow=False decodes encoded cells as they are; noise, n_draws, conditional, steps and solver act on "
                "the flow alone. Leave them out, or give flow=True"
            )
        flow = is_told if flow is None else flow
        config = self._round_trip(options)

        # depths as they were before masking
        dataset = self._dataset(adata, labelled=flow and conditional)
        size = self._size(dataset, np.arange(adata.n_obs)) / (1 - masked_fraction)
        z = (self._encoded(dataset, device) - self.latent_mean) / self.latent_sd
        weights = self._weights(None, len(z))
        if not conditional:
            weights = torch.zeros_like(weights)
            self._check_null(weights)

        # chunk by chunk into a layer
        columns = adata.var_names.get_indexer(self.genes)
        is_missing = None if mask is None else sparse.csr_matrix(mask, dtype=bool)
        imputed = ImputedLayer(adata, is_missing, columns)
        n_round_trips = n_draws if flow else 0
        with self.on_device(device) as chosen:
            for rows in track(_chunks(len(z)), "imputing", progress):
                generator = torch.Generator().manual_seed(noise_seed(seed, 5, rows.start))
                cells = Batch(dataset.condition[rows], target=z[rows], size_factor=size[rows]).to(chosen)
                own_weights = _rows(weights, rows).to(chosen)
                mean = self._resampled(cells, own_weights, noise, n_round_trips, generator, config)
                imputed.add(rows, mean.cpu().numpy())

        new = adata.copy()
        new.layers["imputed"] = imputed.layer()
        how = {"noise": noise, "n_draws": n_draws} if flow else {}
        new.uns["invirtuo"] = self._made_by("impute") | {"flow": flow} | how
        return new

    @takes_options()
    @torch.no_grad()
    def reconstruct(self, adata: AnnData, *, seed: int = 0, device: str | None = None) -> AnnData:
        """Encode cells, decode them at their own depths and draw counts: what the autoencoder makes of real cells.

        Beside generated cells, cells that the model was not fitted to show what part of the distance to real ones is
        the autoencoder's; the flow cannot take it back.

        Parameters
        ----------
        adata
            Raw counts in X, or in ``layers["counts"]``. Labels count where dispersions differ by class.
        seed
            Of the counts that are drawn.
        device
            As in :meth:`PerturbationModel.predict`.

        Returns
        -------
        AnnData with counts (CSR, int32) of the genes of the model and the obs of the given cells.
        """
        import anndata

        has_labels = set(self.design.columns) <= set(adata.obs)
        dataset = self._dataset(adata, labelled=has_labels)
        z = self._encoded(dataset, device)
        own = self._with_genes(counted(adata))
        size = self._size(dataset, np.arange(adata.n_obs))
        counts = self._decoded_layer(own, z, size, dataset.condition[:], "counts", seed)
        uns = {"invirtuo": self._made_by("reconstruct")}
        return anndata.AnnData(counts.astype(np.int32), obs=adata.obs.copy(), var=self._var(), uns=uns)

    def _resampled(
        self,
        cells: Batch,
        weights: Tensor,
        noise: float,
        n_draws: int,
        generator: torch.Generator,
        config: SolverSampling,
    ) -> Tensor:
        """(n, g) means, averaged over jittered round trips of latent vectors; without draws, decoded as they are."""
        field = self.field(cells.condition, cells.size_factor, weights)
        start = self._solved(reversed_time(field), cells.target, config) if n_draws else cells.target
        total = torch.zeros((), device=start.device)
        for _ in range(max(n_draws, 1)):
            z = start
            if n_draws:
                jitter = torch.randn(start.shape, generator=generator).to(start.device)
                z = self._solved(field, start + noise * jitter, config)
            latent = z * self.latent_sd + self.latent_mean
            total = total + self.autoencoder.decode(latent, cells.size_factor, cells.condition).mean
        return total / max(n_draws, 1)

    def _round_trip(self, options: Mapping[str, Any]) -> SolverSampling:
        """Options of the solver on the way to noise and back: 50 steps, unless the caller chooses."""
        config: SolverSampling = self._sampling(options)
        is_adaptive = (config.solver or self.config.solver) == ADAPTIVE
        return config if config.steps or is_adaptive else replace(config, steps=ROUND_TRIP)

    def _check_null(self, weights: Tensor) -> None:
        is_needed = bool((self._null_weight(weights) != 0).any())
        if is_needed and self.config.prob_unconditional == 0:
            raise ValueError(
                f"{self.name}, as it is configured, was never trained on cells without labels, which this asks for; "
                "fit with prob_unconditional above 0, or leave guidance, conditional and invert_with as they are"
            )

    def _null_weight(self, weights: Tensor) -> Tensor:
        """(n,) weight of the velocity without labels: what the weights of attributes leave of 1."""
        own = weights[:, :1] if self.config.conditioning == "joint" else weights
        return 1 - own.sum(dim=1)

    def _dataset(self, adata: AnnData, *, labelled: bool = True) -> CellDataset:
        """Cells to encode, checked; what is not known of their labels, or all, is null."""
        import anndata

        self._check_fitted()
        adata = counted(adata)
        self._check_space(adata)
        adata = self._with_genes(adata)
        if empty := int((self._depths(adata) == 0).sum()):
            raise ValueError(f"{empty} of {adata.n_obs} cells have no counts in the genes of the model; remove them")
        design = self.design if self.design.unknown is not None else replace(self.design, unknown=NULL)
        labels = self._known_labels(adata.obs, design) if labelled else null_labels(adata.obs.index, design)
        return CellDataset(anndata.AnnData(adata.X, obs=labels, var=adata.var[[]]), design)

    def _known_labels(self, obs: pd.DataFrame, design: Design) -> pd.DataFrame:
        """Labels of cells; those that the model has not got are not known to it, which the log says."""
        labels = design.tidy(obs)
        if self.config.prob_unconditional == 0:
            return labels  # it has not learned to do without: new labels are refused
        for name, levels in design.covariates.items():
            is_new = ~labels[name].isin([*levels, design.unknown])
            if is_new.any():
                new = labels[name][is_new].unique()
                logger.warning(
                    "%s: %s do not occur in the training cells; %d cells are treated as if it were not known",
                    *(name, preview(new), is_new.sum()),
                )
                labels.loc[is_new, name] = design.unknown
        return labels

    @torch.no_grad()
    def _encoded(self, dataset: CellDataset, device: str | None = None) -> Tensor:
        """(n, d) latent vectors of all cells, on the autoencoder's scale."""
        chunks = []
        with self.on_device(device) as chosen:
            for rows in _chunks(len(dataset.obs)):
                cells = dataset.dense(np.arange(rows.start, rows.stop))
                z = self.autoencoder.encode(cells.to(chosen))
                chunks.append(z.float().cpu())
        return torch.cat(chunks)

    def _reference(self, batch: str, label: str | None) -> int:
        """Number of the batch that cells are brought to."""
        if batch not in self.design.covariates:
            raise ValueError(
                f"batch={batch!r} is no covariate of this model; covariates: {preview(self.design.covariates)}"
            )
        table = self._table.groupby(batch)["n_cells"].sum().drop([self.design.unknown], errors="ignore")
        if label is not None and str(label) not in table.index:
            raise ValueError(f"reference={label!r} does not occur in the training cells; known: {preview(table.index)}")
        reference = table.idxmax() if label is None else label
        return self.design.covariates[batch].index(str(reference))

    def _decoded_layer(
        self, adata: AnnData, latent: Tensor, size: Tensor, condition: Condition, output: str, seed: int
    ) -> AnyMatrix:
        """Corrected cells in the genes, their order and the type of `adata`."""
        if output not in ("mean", "counts"):
            raise ValueError(f"output is {output!r}; expected mean, counts or None")
        # genes that the model has not got keep their counts
        columns = adata.var_names.get_indexer(self.genes)
        source = counted(adata).X
        blocks = []
        for rows in _chunks(len(latent)):
            block = sparse.csr_matrix(source[rows]).toarray()
            cells = self.autoencoder.decode(latent[rows], size[rows], condition[rows])
            if output == "mean":
                block = block.astype(np.float32)
                block[:, columns] = cells.mean.numpy()
                blocks.append(block)
            else:
                generator = torch.Generator().manual_seed(noise_seed(seed, 6, rows.start))
                block[:, columns] = cells.sample(generator).numpy()
                blocks.append(sparse.csr_matrix(block))
        return np.concatenate(blocks) if output == "mean" else sparse.vstack(blocks, format="csr")

    def _made_by(self, verb: str) -> dict[str, Any]:
        return {"model": self.name, "verb": verb, "data_hash": self.card["data_hash"], "version": self.card["version"]}


def null_labels(cells: pd.Index, design: Design) -> pd.DataFrame:
    """Labels of cells of which nothing is known: no covariate, and as perturbation the control."""
    labels = dict.fromkeys(design.covariates, design.unknown)
    if design.perturbation is not None:
        labels[design.perturbation] = design.control
    return pd.DataFrame(labels, index=cells)


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def _rows(weights: Tensor, rows: slice) -> Tensor:
    """Weights of these cells; a single row holds those of all."""
    return weights if len(weights) == 1 else weights[rows]


def _classes(condition: Condition) -> Tensor:
    """(n,) number of the combination of covariates of each cell."""
    codes = F.pad(condition.groups, (0, 1))  # a column for cells without labels
    number: Tensor = torch.unique(codes, dim=0, return_inverse=True)[1]
    return number


def _collapse(before: Tensor, after: Tensor, group: Tensor) -> float:
    """Variance within groups of equal labels, after over before."""

    def within(z: Tensor) -> float:
        total = 0.0
        for k in group.unique():
            members = z[group == k]
            total += float((members - members.mean(dim=0)).square().sum())
        return total

    return within(after) / max(within(before), 1e-12)
