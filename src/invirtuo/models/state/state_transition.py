"""ST, the State Transition model: a transformer over sets of control cells that predicts sets of perturbed cells.

Paper: Adduri et al. 2025, "Predicting cellular responses to perturbation across diverse contexts with State",
doi:10.1101/2025.06.26.661135, sections 5.3 and 5.7.4, tables 3 and 4. A set of control cells with the covariates of the
wanted condition enters; each cell is encoded, the perturbation (and the batch) is added (15), a bidirectional
transformer without positions lets the cells learn of each other, its output is added to its input (16), and a linear
map gives expression (17). The loss is the energy distance to a set of cells of the condition (18)-(20): no cell is
paired with another. In an embedding space a second network decodes predicted embeddings to genes (21).

Differs: Z_pert is the multi-hot of single perturbations (or features) with the control label as a further column, and
time, if there is one. Features go through the MLP by default; `perturbation_encoder="identity"` is the paper's way.
Differs: sets are redrawn every epoch, and predicted in windows of nearly equal size, padded and masked.
Differs: the paper gives neither optimiser nor learning rate nor steps; the presets have those of the public settings.
Differs: the default of `residual` adds the output to the control cells, in embedding spaces the decoded change to their
expression; the paper's presets have "hidden" (16) and decode cells as a whole (21).
Differs: `confidence` is in table 4 alone. Here it learns the energy distance of a set, without a way back into ST.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.preprocess import EMBEDDED
from invirtuo.cells.samplers import MappedSets, Sampler, without
from invirtuo.cells.transforms import PCA
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.models.state.attention import SetTransformer, pad, windows
from invirtuo.models.state.energy import energy_loss
from invirtuo.settings import Settings, setting
from invirtuo.verbs.controls import ControlCells
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

__all__ = ["Config", "StateTransition"]

logger = logging.getLogger(__name__)

PCA_CELLS = 20_000  # most training cells that principal components are fitted on


@dataclass(frozen=True)
class Config(Settings):
    """Space, sets, network and loss. The paper's letters in brackets."""

    space: Literal["genes", "pca", "obsm"] = setting(
        "genes", 'space of input and target: "genes" (log expression), "pca", or "obsm" with the key below'
    )
    obsm: str = setting("", "key of adata.obsm that holds the embedding")
    n_embedding: int = setting(50, "width of the embedding (E)", ge=1)
    set_size: int = setting(32, "cells of a set (S)", ge=1)
    batch: str = setting("", 'covariate that is a batch; "": none, or the last one if there is a batch encoder')
    mapping: Literal["batch", "context"] = setting(
        "batch", 'control cells share all covariates, or all but the batch ("context")'
    )
    hidden_dim: int = setting(128, "width of cells inside the network (h)", ge=1)
    n_encoder_layers: int = setting(4, "linear maps in the encoders of cell and perturbation", ge=1)
    n_decoder_layers: int = setting(
        1, "linear maps from the transformer to the output; table 3 says 4, equation 17 says 1", ge=1
    )
    encoder_norm: bool = setting(True, "layer norms in the encoders and the map to the output")
    dropout: float = setting(0.0, "dropout in the encoders and the map to the output", ge=0, lt=1)
    batch_encoder: bool = setting(False, "add an embedding of the batch")
    perturbation_encoder: Literal["mlp", "identity"] = setting(
        "mlp", 'encoder of perturbations; "identity" adds features as they are and needs hidden_dim of them'
    )
    backbone: Literal["llama", "gpt2"] = setting("llama", 'kind of transformer; "gpt2" for sparse data')
    n_layers: int = setting(4, "blocks of the transformer", ge=1)
    n_heads: int = setting(8, "attention heads of the transformer", ge=1)
    feed_forward: int = setting(4, "width of its feed-forward part over hidden_dim", ge=1)
    mixing: Literal["attention", "mean", "none"] = setting(
        "attention",
        'mixing of the cells of a set; "mean" (pseudobulk) and "none" (each cell alone) are ablations of figure 1B',
    )
    residual: Literal["hidden", "cell", "expression", "none"] = setting(
        "expression", 'what is changed: control cells; "hidden" (16) or "cell", codes; "none"'
    )
    output_activation: Literal["none", "relu"] = setting(
        "none", 'activation of the output; "relu" acts in gene space alone'
    )
    clip: bool = setting(True, "raise predicted expression below 0 to 0")
    loss_scale: float = setting(
        1.0,
        "factor on the energy distance; 1 is equation 18; geomloss, and public code with it, computes half of that",
        gt=0,
    )
    decoder_weight: float = setting(
        0.1, "weight of the energy distance between genes, beside that between embeddings", ge=0
    )
    decoder_widths: tuple[int, ...] = setting((1024, 512), "hidden layers from embedding to genes", ge=1)
    decoder_dropout: float = setting(0.0, "dropout in the decoder to genes", ge=0, lt=1)
    decode_from: Literal["embedding", "hidden"] = setting(
        "embedding", 'what is decoded to genes: the predicted embedding (21), or "hidden"'
    )
    confidence: bool = setting(False, "learn to tell how far a predicted set is from the real one")

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        super().__post_init__()
        if (self.space == "obsm") != bool(self.obsm):
            raise ValueError(f'space is {self.space!r} and obsm is {self.obsm!r}; space="obsm" and a key go together')


def encoder(n_in: int, width: int, n_layers: int, n_out: int, *, norm: bool = True, dropout: float = 0.0) -> nn.Module:
    """`n_layers` linear maps with layer norm and GELU after each but the last (table 4)."""
    widths = [n_in, *[width] * (n_layers - 1), n_out]
    return funnel(widths, norm=norm, dropout=dropout)


def funnel(widths: Sequence[int], *, norm: bool = True, dropout: float = 0.0) -> nn.Module:
    """Linear maps through these widths with layer norm, GELU and dropout between them."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(n_in, n_out))
        if i == len(widths) - 2:
            break
        if norm:
            layers.append(nn.LayerNorm(n_out))
        layers.append(nn.GELU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


_DEFAULT = Config()
_PAPER = Config(residual="hidden", decoder_dropout=0.1)
_TAHOE = replace(_PAPER, set_size=256, hidden_dim=1488, n_heads=12)
_PARSE = replace(_PAPER, set_size=512, hidden_dim=1440, n_heads=12, batch_encoder=True)
_REPLOGLE = replace(_PAPER, set_size=32, hidden_dim=128, n_heads=8, backbone="gpt2")
_FIT = FitConfig(steps=1000, batch_size=256, lr=1e-3, clip=10.0, ema=0.99)
_PAPER_FIT = FitConfig(steps=40_000, lr=1e-4, schedule="constant", warmup=0, clip=10.0, ema=0.0, keep="best")


class StateTransition(PerturbationModel):
    """Control cells in sets -> perturbed cells in sets, by a transformer over the cells of a set.

    Every condition is predicted from control cells of the same covariates. With `batch`, sets hold cells of one batch;
    their control cells are of that batch, or of any batch of the context (`mapping`).

    References
    ----------
    Adduri et al. 2025, doi:10.1101/2025.06.26.661135.
    """

    name = "state_transition"
    Config = Config
    PRESETS = {
        "default": Preset(_DEFAULT, _FIT, "ours, for a CPU"),
        "pca": Preset(replace(_DEFAULT, space="pca"), _FIT, "ours, on principal components"),
        "pseudobulk": Preset(replace(_DEFAULT, mixing="mean"), _FIT, "ablation of ours, figure 1B"),
        "no-attention": Preset(replace(_DEFAULT, mixing="none"), _FIT, "ablation of ours, figure 1B"),
        "single-cell": Preset(replace(_DEFAULT, set_size=1), _FIT, "ablation of ours, figure 1B"),
        "tahoe": Preset(_TAHOE, replace(_PAPER_FIT, batch_size=16 * 256), "table 3, Tahoe-100M"),
        "parse-pbmc": Preset(_PARSE, replace(_PAPER_FIT, batch_size=16 * 512), "table 3, Parse-PBMC"),
        "replogle-nadig": Preset(_REPLOGLE, replace(_PAPER_FIT, batch_size=16 * 32), "table 3, Replogle-Nadig"),
    }
    SEARCH = {
        "fit.lr": (1e-4, 1e-2),
        "hidden_dim": [64, 128, 256],
        "set_size": [16, 32, 64, 128],
        "n_layers": [2, 4, 6],
    }
    takes_features = True
    needs_source = True
    sampler: str | Sampler = "sets"

    # ---- network -----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Encoders, transformer and heads."""
        # the space of the model: genes, principal components or given embeddings
        config, width = self.config, self.config.hidden_dim
        self.set_size = config.set_size
        self.n_genes = len(self.genes)
        self.embedded = config.space != "genes"
        n_in = min(config.n_embedding, self.n_genes) if config.space == "pca" else config.n_embedding
        self.n_in = n_in if self.embedded else self.n_genes
        if config.space == "obsm":
            self.obsm, self.obsm_width = config.obsm, self.n_in

        # sets within batches
        self.groups_by_controls = not config.batch_encoder
        self.batch = self._find_batch()
        if self.batch:
            covariate = list(self.design.covariates).index(self.batch)
            self.sampler = MappedSets(config.set_size, config.mapping, covariate)

        # encoders of cells, perturbations and batches
        mlp = partial(encoder, norm=config.encoder_norm, dropout=config.dropout)
        self.cell_encoder = mlp(self.n_in, width, config.n_encoder_layers, width)
        self.perturbation_encoder = self._perturbation_encoder(mlp)
        if config.batch_encoder:
            self.batch_encoder = nn.Embedding(len(self.design.covariates[self.batch]), width)
            nn.init.normal_(self.batch_encoder.weight, std=0.02)

        # transformer, and heads to the space of the model, to genes, and to the expected distance
        self.transformer = SetTransformer(
            width,
            config.n_layers,
            config.n_heads,
            config.feed_forward * width,
            backbone=config.backbone,
            mixing=config.mixing,
        )
        self.head = mlp(width, width, config.n_decoder_layers, self.n_in)
        if self.embedded:
            n_decoded = self.n_in if config.decode_from == "embedding" else width
            self.decoder = funnel([n_decoded, *config.decoder_widths, self.n_genes], dropout=config.decoder_dropout)
            if config.residual == "expression" and config.decode_from == "embedding":
                # a change is a difference of two decoded embeddings, in which the last bias cancels
                last = self.decoder.get_submodule(str(len(self.decoder) - 1))
                last.register_parameter("bias", None)
        if config.confidence:
            self.confidence_head = funnel([width, width // 2, width // 4, 1])
        self._encoder: str | None = None

    def _find_batch(self) -> str:
        """Name of the covariate that is the batch, or ""."""
        config, covariates = self.config, self.design.covariates
        if config.batch and config.batch not in covariates:
            raise ValueError(f"batch {config.batch!r} is no covariate of the design; found {preview(covariates)}")
        if config.batch_encoder and not covariates:
            raise ValueError("a batch encoder needs a covariate; name the batch in covariates= of the Design")
        return config.batch or (list(covariates)[-1] if config.batch_encoder else "")

    def _perturbation_encoder(self, mlp: Callable[..., nn.Module]) -> nn.Module:
        """Encoder of conditions, or the identity for vectors that are as wide as codes of cells."""
        config, width = self.config, self.design.code_width
        if config.perturbation_encoder == "mlp":
            n_in = width + 1 + int(self.design.time is not None)
            return mlp(n_in, config.hidden_dim, config.n_encoder_layers, config.hidden_dim)
        if width != config.hidden_dim or self.design.time is not None:
            raise ValueError(
                f'perturbation_encoder="identity" adds vectors of perturbations to cells of width {config.hidden_dim}; '
                f"found vectors of width {width}{' and time' if self.design.time else ''}. Set hidden_dim={width}, "
                'give other features, or take "mlp"'
            )
        return nn.Identity()

    def encode_condition(self, condition: Condition) -> Tensor:
        """Codes that are added to those of cells (13)-(15): n conditions -> (n, h)."""
        blocks = [condition.code]
        if self.config.perturbation_encoder == "mlp":
            blocks += [condition.is_control[:, None].to(condition.code.dtype)]
            blocks += [value[:, None] for value in condition.continuous.values()]
        encoded = self.perturbation_encoder(torch.cat(blocks, dim=1))
        if self.config.batch_encoder:
            encoded = encoded + self.batch_encoder(condition.covariates[self.batch])
        return encoded

    def forward(self, cells: Tensor, condition: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Transform control cells that lie set after set.

        Parameters
        ----------
        cells
            (n, e), in the space of the model.
        condition
            (n, h), encoded.
        sizes
            Cells of each set; they sum to n.

        Returns
        -------
        Predicted cells (n, e), and what they were read from (n, h).
        """
        # cells of a set see each other
        code = self.cell_encoder(cells)
        hidden = code + condition
        padded, present = pad(hidden, sizes)
        mixed = self.transformer(padded, present)
        mixed = mixed.flatten(0, 1) if present is None else mixed[present]

        # the residual is added to hidden codes, or to the cells themselves
        residual = {"hidden": hidden, "cell": code}.get(self.config.residual)
        mixed = mixed if residual is None else mixed + residual
        predicted = self.head(mixed)
        if self.config.residual == "expression":
            predicted = predicted + cells
        if self.config.output_activation == "relu" and not self.embedded:
            predicted = predicted.relu()
        return predicted, mixed

    # ---- spaces ------------------------------------------------------------------------------------------------

    def _check_space(self, adata: AnnData) -> None:
        super()._check_space(adata)
        if self.config.space != "obsm":
            return
        key = self.config.obsm
        found = np.shape(adata.obsm[key]) if key in adata.obsm else preview(adata.obsm) or "no obsm"
        if found != (adata.n_obs, self.n_in):
            raise ValueError(
                f"expected obsm[{key!r}] of width {self.n_in}; found {found}. Embed the cells first, or change obsm "
                "and n_embedding"
            )
        self._check_encoder(adata.uns.get(EMBEDDED, {}).get(key, ""))

    def _check_encoder(self, checkpoint: str) -> None:
        """Refuse embeddings of another encoder than the one whose embeddings were seen before."""
        known = self.card.get("encoder", self._encoder)
        if known not in (None, checkpoint):
            raise ValueError(
                f"obsm[{self.config.obsm!r}] was made by the encoder {checkpoint or 'of unknown origin'}; this model "
                f"knows those of {known or 'unknown origin'}. Embed the cells with the same one, or make a new model"
            )
        self._encoder = checkpoint

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """The encoder whose embeddings were learned from."""
        return {} if self.config.space != "obsm" else {"encoder": self._encoder}

    def prepare(self, dataset: CellDataset) -> None:
        """Fit principal components to training cells, unless those of an earlier model are kept."""
        if self.batch and self.config.mapping == "batch":
            layout = dataset.layout()
            without_controls = sorted(set(layout.group) - set(layout.group[layout.is_control]))
            if without_controls:
                names = preview([layout.group_names[g] for g in without_controls])
                logger.info("no control cells of the same batch for %s; those of the context are taken", names)
        if self.config.space != "pca" or self._start:
            return
        rows = dataset.rows("train")
        if len(rows) < self.n_in:
            raise ValueError(f"{self.n_in} principal components need as many training cells, found {len(rows)}")
        chosen = np.sort(np.random.default_rng(0).permutation(rows)[:PCA_CELLS])
        self.transforms["pca"] = PCA(self.n_in).fit(dataset.dense(chosen).numpy())

    def represent(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Expression (n, g) of cells, or their embedding (n, d), to the space of the model (n, e)."""
        if self.config.space == "obsm":
            return embedding
        if self.config.space == "pca":
            with torch.autocast(x.device.type, enabled=False):
                return self.transforms["pca"].forward(x.float())
        return x

    def decode(self, predicted: Tensor, hidden: Tensor, source: Tensor, cells: Tensor) -> Tensor:
        """Expression (n, g) of predicted cells; their control cells are `source` (n, g), in the model's space `cells`.

        With residual "expression" what is decoded is the change: of the embedding, or as read from the hidden code.
        """
        if not self.embedded:
            return predicted
        decoded = self.decoder(predicted if self.config.decode_from == "embedding" else hidden)
        if self.config.residual != "expression":
            return decoded
        if self.config.decode_from == "embedding":
            decoded = decoded - self.decoder(cells)
        return source + decoded

    # ---- loss and prediction -----------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Energy distance of predicted to real sets, mean over the sets; in embedding spaces with that of the genes."""
        # all cells of a set have one condition
        config, size = self.config, batch.set_size
        condition = self.encode_condition(batch.condition[::size]).repeat_interleave(size, dim=0)
        sizes = [size] * (len(batch) // size)
        cells = self.represent(batch.source, batch.source_embedding)
        predicted, hidden = self(cells, condition, sizes)

        def distance(x: Tensor, y: Tensor) -> Tensor:
            return config.loss_scale * energy_loss(x.unflatten(0, (-1, size)), y.unflatten(0, (-1, size)))

        # in the space of the model, and in genes where that is another one
        per_set = distance(predicted, self.represent(batch.target, batch.embedding))
        losses = {"total": per_set.mean()}
        if self.embedded:
            decoded = self.decode(predicted, hidden, batch.source, cells)
            genes = distance(decoded, batch.target).mean()
            losses |= {
                "total": losses["total"] + config.decoder_weight * genes,
                "embedding": per_set.mean(),
                "genes": genes,
            }

        # the confidence head predicts the distance of its set, and trains nothing else
        if config.confidence:
            guess = self.confidence_head(hidden.detach()).unflatten(0, (-1, size)).mean(dim=(1, 2))
            losses["confidence"] = (guess.float() - per_set.detach()).square().mean()
            losses["total"] = losses["total"] + losses["confidence"]
        return losses

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Control cells of a condition, in windows of at most `set_size`, to expression (n, g)."""
        decoded = []
        for own, cells, predicted, hidden in self._windows(batch, config.batch_size):
            decoded.append(self.decode(predicted, hidden, own.source, cells))
        x = torch.cat(decoded).float()
        return x.clamp_min(0) if self.config.clip else x

    def _windows(self, batch: Batch, batch_size: int) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Cut a batch into smaller ones of about `batch_size` cells, and transform them window by window.

        Yields the smaller batch, its control cells in the model's space, predicted cells, and codes. The windows do not
        depend on `batch_size`.
        """
        sizes, start = windows(len(batch), self.set_size), 0
        at_once = max(batch_size // self.set_size, 1)
        for first in range(0, len(sizes), at_once):
            own = sizes[first : first + at_once]
            smaller = batch[start : start + sum(own)]
            start += len(smaller)
            cells = self.represent(smaller.source, smaller.source_embedding)
            yield smaller, cells, *self(cells, self.encode_condition(smaller.condition), own)

    @torch.no_grad()
    def expected_loss(self, conditions: pd.DataFrame, n_cells: int = 256, *, seed: int = 0) -> pd.Series:
        """Energy distance that the confidence head expects between predicted and real sets of each condition.

        Parameters
        ----------
        conditions
            As for :meth:`predict`.
        n_cells
            Control cells to look at for each.
        seed
            Of their choice.

        Returns
        -------
        One number per condition, named by it.

        Raises
        ------
        ValueError
            If the model has no confidence head, is not fitted, or a condition is unknown.
        """
        if not self.config.confidence or not self.card:
            raise ValueError("expected_loss needs a fitted model with a confidence head; set confidence=True and fit")
        table, pool = self.wanted(conditions), self._pool(None)
        rng = np.random.default_rng(seed)
        found = {}
        for i in range(len(table)):
            row = table.iloc[[i]]
            controls = pool[self.design.groups(row).iloc[0]]
            source, embedding = controls.take(rng.integers(len(controls), size=n_cells))
            batch = Batch(self.design.encode(table.iloc[[i] * n_cells]), source=source, source_embedding=embedding)
            heads = [self.confidence_head(hidden) for *_, hidden in self._windows(batch, n_cells)]
            found[self.design.names(row).iloc[0]] = float(torch.cat(heads).mean())
        return pd.Series(found, name="expected_loss", dtype=float)

    def _pool(self, controls: AnnData | None) -> dict[str, ControlCells]:
        """Control cells of every group, by the mapping."""
        own = super()._pool(controls)
        if not self.batch:
            return own

        # a context holds the groups that differ in the batch alone
        covariate = list(self.design.covariates).index(self.batch)
        contexts: dict[str, list[ControlCells]] = {}
        for group, cells in own.items():
            contexts.setdefault(without(group, covariate), []).append(cells)

        # for every batch, its own control cells or those of all batches
        pool = {}
        for context, of_batches in contexts.items():
            merged = ControlCells.joined(of_batches)
            labels = context.split("|") if context else []
            for level in self.design.covariates[self.batch]:
                group = "|".join([*labels[:covariate], level, *labels[covariate:]])
                pool[group] = own[group] if self.config.mapping == "batch" and group in own else merged
        return pool

    # ---- transfer ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def adapt(self, design: Design, genes: Sequence[str], config: Any = None, *, min_shared: float = 0.5) -> Self:
        """Make a model for another data set that starts from the weights of this one; all of it is trainable.

        The encoder of the perturbations and the decoder to genes begin anew. In gene space, weights of the cell encoder
        and of the output follow their genes by name, and new genes begin anew. Batches are matched by name; new ones
        begin at the mean of the known ones. Everything else is kept, the principal components too (section 5.6.2).

        Parameters
        ----------
        design, genes
            Of the new data set.
        config
            A Config with layers of the same sizes; None takes that of this model.
        min_shared
            Least share of the new genes that this model must know, in gene space.

        Returns
        -------
        A model to be fitted.

        Raises
        ------
        ValueError
            If this model is not fitted, layers differ in size, or too few genes are shared.
        """
        self._check_fitted()
        new = type(self)(design, genes, config or self.config)
        if config is None:
            new.fit_config = self.fit_config
        if self.config.space == "pca" and new.genes != self.genes:
            raise ValueError("principal components are those of the first data set; expected the same genes in order")
        new.transforms = dict(self.transforms)
        new._encoder = self.card.get("encoder")

        # weights to start from, which a fit takes up again
        shared = len(set(self.genes) & set(new.genes))
        if not self.embedded and shared < min_shared * new.n_genes:
            raise ValueError(
                f"{shared} of {new.n_genes} genes are known to this model, fewer than min_shared={min_shared}; "
                "match the gene names, or lower it"
            )
        logger.info("adapting: %d of %d genes are known", shared, new.n_genes)
        new.begin_with({name: self._kept(new, name, value) for name, value in new.named_parameters()})
        return new

    def _kept(self, new: StateTransition, name: str, value: Tensor) -> Tensor:
        """Weights that a new model begins with; NaN where they begin anew."""
        fresh = torch.full_like(value, torch.nan)
        old = dict(self.named_parameters()).get(name)
        if name.startswith(("perturbation_encoder.", "decoder.")) or old is None:
            return fresh

        # batches by name
        if name == "batch_encoder.weight":
            rows = _matches(self.design.covariates[self.batch], new.design.covariates[new.batch])
            return torch.where((rows >= 0)[:, None], old[rows], old.mean(dim=0))

        # genes by name: columns of the first layer, rows of the last
        last = f"head.{len(self.head) - 1}."
        if not self.embedded and (name == "cell_encoder.0.weight" or name.startswith(last)):
            rows = _matches(self.genes, new.genes)
            by_gene = old.T if name == "cell_encoder.0.weight" else old
            known = (rows >= 0).view(-1, *[1] * (by_gene.ndim - 1))
            found = torch.where(known, by_gene[rows], torch.nan)
            return found.T if name == "cell_encoder.0.weight" else found

        if old.shape != value.shape:
            raise ValueError(
                f"{name} has the shape {tuple(old.shape)} here and {tuple(value.shape)} in the new model; "
                "pass a config with layers of the same sizes"
            )
        return old.clone()


def _matches(known: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """(n,), position of each wanted name among the known ones, or -1."""
    return torch.from_numpy(pd.Index(known).get_indexer(pd.Index(wanted)).astype(np.int64))
