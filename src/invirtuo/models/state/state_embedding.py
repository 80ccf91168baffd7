"""SE, the State Embedding model: a transformer over the genes of a cell whose output is an embedding of the cell.

Paper: Adduri et al. 2025, "Predicting cellular responses to perturbation across diverse contexts with State",
doi:10.1101/2025.06.26.661135, section 5.4. A cell is the sequence of its most expressed genes between two learned
tokens (23). A gene is a fixed vector, projected (22), plus a soft bin of its value (24)-(26). The two tokens come out
of a transformer (27)-(29) as the embedding (30), from which a decoder predicts the values of any genes, expressed ones,
silent ones, and some that all cells of the batch share (31)-(34). The second token also gives the data set (35)-(36).

Data sets with different genes are learned from together: join them with `anndata.concat(..., join="outer",
label="dataset", fill_value=0)` and name that column as a covariate. A gene belongs to a data set if one of its training
cells expresses it; the others are neither read nor predicted there.

Differs: `fill="none"`, our default, leaves cells with few genes short (padded and masked); the paper fills up with
silent genes at random. With "genes", embedding fills in an order that is stored with the weights: it is deterministic.
Differs: the decoder's blocks are LayerNorm(x + Linear(ReLU(Linear(x)))) of constant width; the paper gives no form.
Differs: the learning rate falls to 0, not to 30 %; gradients are clipped by their norm, not by zclip.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Batch
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.genes import hashed_vectors, read_vectors
from invirtuo.cells.source import to_csr
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.settings import Settings, setting
from invirtuo.verbs.model import Model, Preset
from invirtuo.verbs.sampling import NoSampling, takes_options

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Config", "StateEmbedding"]

logger = logging.getLogger(__name__)

CHUNK = 32  # cells embedded at once, always: products of other sizes differ in their last digits
RANKS = 1 << 20  # more than any number of genes: a rank below it breaks ties between equal values


@dataclass(frozen=True)
class Config(Settings):
    """Genes, sequence, network and loss. The paper's letters in brackets."""

    gene_vectors: str = setting("random", '"random" (by name), "one-hot", or a file with vectors: .npz, .csv or .tsv')
    gene_width: int = setting(200, "width of the gene vectors (5120 for ESM-2)", ge=1)
    vector_norm: bool = setting(False, "bring vectors to length sqrt(h), as public code does")
    dataset: str = setting("dataset", "covariate that names the data set; without it there is one")
    length: int = setting(128, "genes of a cell that are read (L)", ge=1)
    order: Literal["specific", "value"] = setting(
        "specific", 'genes read first: highest "value" (5.4.2), or high ones that few cells express'
    )
    fill: Literal["none", "genes"] = setting(
        "none",
        'what fills up sentences of cells with fewer genes: nothing, or silent "genes" (5.4.2)',
    )
    value: Literal["log", "percent"] = setting(
        "log", 'what is binned: log expression, or "percent" of the cell\'s sum, as in public code'
    )
    hidden_dim: int = setting(64, "width of genes inside the network (h)", ge=1)
    n_layers: int = setting(2, "layers of the transformer", ge=1)
    n_heads: int = setting(2, "attention heads", ge=1)
    feed_forward: int = setting(3, "width of the feed-forward part over hidden_dim", ge=1)
    dropout: float = setting(
        0.0,
        "dropout of attention and feed-forward part; above 0 attention is not fused and three times slower",
        ge=0,
        lt=1,
    )
    n_bins: int = setting(10, "bins of the values", ge=1)
    bin_width: int = setting(512, "width of the hidden layer that chooses bins", ge=1)
    n_dataset: int = setting(10, "width of the embedding's second part, which knows the data set", ge=1)
    cell_norm: Literal["none", "l2"] = setting(
        "none", 'norm of embeddings; "l2" brings embeddings to length 1, as in public code'
    )
    n_expressed: int = setting(96, "genes of the sequence that are predicted (P)", ge=1)
    n_silent: int = setting(96, "genes outside of the sequence (N)", ge=1)
    n_shared: int = setting(64, "genes that all cells of a batch share (R)", ge=1)
    gene_weight: float = setting(1.0, "weight of the loss over the genes of a cell (lambda 1)", ge=0)
    cell_weight: float = setting(1.0, "weight of the loss over the cells of a gene (lambda 2)", ge=0)

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        super().__post_init__()
        if self.hidden_dim % self.n_heads:
            raise ValueError(f"{self.n_heads} heads do not divide the width {self.hidden_dim}; change one of them")


class Decoder(nn.Module):
    """Values of genes from the embedding of a cell, the vector of a gene, and the depth of the cell (31)."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.out = nn.Linear(width, 1)

    def forward(self, z: Tensor, genes: Tensor, depth: Tensor) -> Tensor:
        """z (n, d), genes (n, m, h), depth (n,) -> (n, m)."""
        m = genes.shape[1]
        cells = z[:, None].expand(-1, m, -1)
        depths = depth[:, None, None].expand(-1, m, 1)
        x = torch.cat([cells, genes, depths], dim=2)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x))
        return self.out(x).squeeze(2)


_TINY = Config(length=64, hidden_dim=32, n_layers=1)
_SMALL = Config(
    length=1024,
    hidden_dim=256,
    n_layers=4,
    n_heads=8,
    dropout=0.1,
    n_expressed=256,
    n_silent=256,
    n_shared=128,
)
_PAPER = Config(
    gene_width=5120,
    length=2048,
    order="value",
    fill="genes",
    hidden_dim=2048,
    n_layers=16,
    n_heads=16,
    dropout=0.1,
    n_expressed=512,
    n_silent=512,
    n_shared=256,
)
_FIT = FitConfig(steps=1000, batch_size=64, optimizer="adamw", lr=1e-3, weight_decay=0.01, clip=0.8, ema=0.0)
_SMALL_FIT = replace(_FIT, steps=20_000, batch_size=128, lr=3e-4)
_PAPER_FIT = replace(_FIT, steps=218_000, batch_size=24, accumulate=4, lr=1e-5, warmup=6_540, precision="bf16")


class StateEmbedding(Model):
    """Cells of any data set -> embeddings, learned by predicting the expression of genes.

    `fit` takes log expression of one or several data sets; a Design needs no perturbation. Genes may be more than the
    data have. :meth:`embed` depends on the cell alone: not on its batch, its data set or the other cells.

    References
    ----------
    Adduri et al. 2025, doi:10.1101/2025.06.26.661135.
    """

    name = "state_embedding"
    verb = "embed"
    Sampling = NoSampling
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _FIT, "ours, for a CPU"),
        "tiny": Preset(_TINY, replace(_FIT, steps=500), "ours, for a quick look"),
        "small": Preset(_SMALL, _SMALL_FIT, "ours, for one GPU"),
        "paper": Preset(_PAPER, _PAPER_FIT, "section 5.4 and 5.5; steps for four epochs of its corpus on 32 GPUs"),
    }

    known: Tensor  # (g,), whether a gene has a vector
    measured: Tensor  # (data sets, g), whether a data set has the gene
    rank: Tensor  # (g,), of a gene by name, from last to first
    weight: Tensor  # (g,), of the value of a gene in the order of a sentence
    filler: Tensor  # (g,), order in which silent genes fill up a sentence
    vectors: Tensor  # (g, d)

    # ---- network -----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Vectors of genes, tokens, transformer, decoder."""
        config, width, n_genes = self.config, self.config.hidden_dim, len(self.genes)
        self.one_hot = config.gene_vectors == "one-hot"
        levels = self.design.covariates.get(config.dataset, ("",))
        n_in = n_genes if self.one_hot else config.gene_width

        # words: a projected vector for the gene, a mixture of bins for its value
        self.gene_map = nn.Linear(n_in, width)
        self.gene_norm = nn.LayerNorm(width)
        self.bin_choice = nn.Sequential(
            nn.Linear(1, config.bin_width), nn.LeakyReLU(), nn.Linear(config.bin_width, config.n_bins)
        )
        self.bins = nn.Parameter(torch.randn(config.n_bins, width) * 0.02)
        self.tokens = nn.Parameter(torch.randn(2, width) * 0.02)  # of the cell and of the data set

        self.transformer = nn.ModuleList()
        layer = partial(nn.TransformerEncoderLayer, activation="gelu", batch_first=True, norm_first=True)
        for _ in range(config.n_layers):
            self.transformer.append(layer(width, config.n_heads, config.feed_forward * width, config.dropout))

        # what is read from the tokens
        self.cell_norm, self.dataset_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dataset_map = nn.Linear(width, config.n_dataset)
        self.decoder = Decoder(self.n_embedding + width + 1)
        if len(levels) > 1:
            self.dataset_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(levels)))

        # what `prepare` learns of the genes
        self.register_buffer("known", torch.zeros(n_genes, dtype=torch.bool))
        self.register_buffer("measured", torch.zeros(len(levels), n_genes, dtype=torch.bool))
        self.register_buffer("rank", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("filler", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("weight", torch.ones(n_genes))
        self.register_buffer("vectors", torch.zeros(0 if self.one_hot else n_genes, config.gene_width))

    @property
    def n_embedding(self) -> int:
        """Width of the embedding: h for the cell, and the part that knows the data set."""
        return self.config.hidden_dim + self.config.n_dataset

    def prepare(self, dataset: CellDataset) -> None:
        """Look up the vectors of genes, and which genes each data set has."""
        n_genes = len(self.genes)
        self._set_vectors()

        # data set of every cell
        name, rows = self.config.dataset, dataset.rows("train")
        of_level = np.zeros(len(dataset.split), np.int64)
        if name in self.design.covariates:
            of_level = dataset.condition.map(lambda condition: condition.covariates[name]).numpy()
        if (of_level < 0).any():
            raise ValueError(f"{name!r} is unknown for some cells; name the data set of every cell")

        # a data set has the genes that any of its cells expresses
        n_cells = np.zeros((len(self.measured), n_genes), np.int64)
        for own, x in dataset.blocks("train"):
            for level in np.unique(of_level[own]):
                is_expressed = x[of_level[own] == level] > 0
                n_cells[level] += np.asarray(is_expressed.sum(axis=0)).ravel()
        self.measured.copy_(torch.from_numpy(n_cells > 0) & self.known)
        if self.config.order == "specific":
            rarity = len(rows) / np.maximum(n_cells.sum(0), 1)
            self.weight.copy_(torch.from_numpy(np.log1p(rarity)))

        # orders of genes: by name, and of silent ones at random
        by_name = np.argsort(np.array(self.genes), kind="stable")
        self.rank[torch.from_numpy(by_name)] = torch.arange(n_genes, 0, -1)
        self.filler.copy_(torch.from_numpy(np.random.default_rng(0).permutation(n_genes) + 1))

    def _set_vectors(self) -> None:
        """Look up the vector of every gene, and note which have one."""
        # a number or vector for each gene, NaN without one
        source = self.config.gene_vectors
        if source == "one-hot":
            self.known.fill_(True)
            return
        if source == "random":
            table = hashed_vectors(self.genes, self.config.gene_width)
        elif not Path(source).exists() and bool(self.known.any()):  # a saved model that is fitted again
            return
        else:
            table = read_vectors(source, self.genes)
        if table.shape[1] != self.config.gene_width:
            raise ValueError(f"vectors in {source} have {table.shape[1]} numbers; set gene_width={table.shape[1]}")

        # genes without a vector cannot be read
        found = np.isfinite(table).all(axis=1)
        if not found.any():
            raise ValueError(
                f"{source} has no vector for any of the genes {preview(self.genes)}; expected gene names alike"
            )
        logger.info("%d of %d genes have a vector; the others are not read", found.sum(), len(found))

        self.known.copy_(torch.from_numpy(found))
        vectors = torch.from_numpy(np.where(found[:, None], table, 0)).float()
        if self.config.vector_norm:
            vectors = F.normalize(vectors, dim=1) * self.config.hidden_dim**0.5
        self.vectors.copy_(vectors)
        self.config = replace(self.config, gene_vectors=Path(source).name)  # vectors travel with the weights

    def gene_codes(self) -> Tensor:
        """Projected vectors of all genes (g, h) (22)."""
        projected = self.gene_map.weight.T + self.gene_map.bias if self.one_hot else self.gene_map(self.vectors)
        return F.silu(self.gene_norm(projected))

    def sentence(self, x: Tensor, allowed: Tensor, *, shuffle: bool = False) -> tuple[Tensor, Tensor]:
        """The genes of each cell that are read: most expressed first, equal values by name.

        Parameters
        ----------
        x
            (n, g), log expression.
        allowed
            (n, g) or (1, g) bool, genes that may be read.
        shuffle
            Fill up with silent genes in random order, in place of the fixed one.

        Returns
        -------
        Numbers of the genes (n, l), and which of these are to be read (n, l).
        """
        # bits of floats above 0 are in the order of the floats
        expressed = (x > 0) & allowed
        value = (x.float() * self.weight).contiguous()
        keys = (value.view(torch.int32).long() * RANKS + self.rank) * expressed
        if self.config.fill == "genes":
            order = torch.randint(1, RANKS, x.shape, device=x.device) if shuffle else self.filler
            keys = torch.where(expressed, keys, order * allowed)
        top = keys.topk(min(self.config.length, x.shape[1]), dim=1)
        return top.indices, top.values > 0

    def encode(self, x: Tensor, genes: Tensor, present: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of cells (24)-(30).

        Parameters
        ----------
        x
            (n, g), log expression.
        genes, present
            (n, l), the sentence.
        codes
            (g, h), projected genes.

        Returns
        -------
        Embedding (n, h + 10), and the token of the data set (n, h).
        """
        # words of the sentence
        values = x.gather(1, genes)
        if self.config.value == "percent":
            values = 100 * values / x.sum(dim=1, keepdim=True).clamp_min(1e-6)
        share = self.bin_choice(values[..., None].to(codes.dtype)).softmax(dim=-1)
        words = codes[genes] + share @ self.bins

        # between two tokens, which are always there; what is absent in all cells is left out
        first, last = (token.expand(len(x), 1, -1) for token in self.tokens)
        absent = F.pad(~present, (1, 1))
        width = int((~absent).sum(dim=1).max())
        words = words[:, : width - 2]
        absent = torch.cat([absent[:, : width - 1], absent[:, -1:]], dim=1)

        out = torch.cat([first, words, last], dim=1)
        for layer in self.transformer:
            out = layer(out, src_key_padding_mask=absent)

        token = self.dataset_norm(out[:, -1])
        z = torch.cat([self.cell_norm(out[:, 0]), self.dataset_map(token)], dim=1)
        if self.config.cell_norm == "l2":
            z = F.normalize(z, dim=1)
        return z, token

    # ---- loss --------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Errors of predicted expression over genes and over cells, and of the guessed data set (32)-(37)."""
        # embeddings of the cells
        x, config = batch.target, self.config
        levels = batch.condition.covariates.get(config.dataset)
        allowed = self.measured[:1] if levels is None else self.measured[levels]
        codes = self.gene_codes()
        genes, present = self.sentence(x, allowed, shuffle=True)
        z, token = self.encode(x, genes, present, codes)

        # from which the values of genes are predicted
        targets, valid = self._target_genes(x, allowed, genes, present)
        guess = self.decoder(z, codes[targets], depth(x, genes, present))
        error = (guess.float() - x.gather(1, targets)) * valid
        losses = {
            "genes": error.norm(dim=1).mean(),
            "cells": error[:, -config.n_shared :].norm(dim=0).mean(),
        }
        losses["total"] = config.gene_weight * losses["genes"] + config.cell_weight * losses["cells"]
        if levels is not None and len(self.measured) > 1:
            losses["dataset"] = F.cross_entropy(self.dataset_head(token).float(), levels)
            losses["total"] = losses["total"] + losses["dataset"]
        return losses

    def _target_genes(self, x: Tensor, allowed: Tensor, genes: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Genes to predict (n, m), expressed, silent and shared ones, and which of them count (n, m).

        Of a cell with too few expressed genes, more of those outside of its sentence are predicted.
        """
        # keys: genes outside of the sentence in random order, those inside of it and those not allowed below 0
        n, config = len(x), self.config
        chance = torch.rand(x.shape, device=x.device)
        inside = torch.zeros_like(x, dtype=torch.bool).scatter_(1, genes, present)
        keys = torch.where(inside, -1.0, chance) * allowed - (~allowed).float()

        # expressed genes of the sentence that are chosen go before all others
        expressed = torch.rand(genes.shape, device=x.device) * (present & (x.gather(1, genes) > 0))
        chosen = expressed.topk(min(config.n_expressed, genes.shape[1]), dim=1)
        own = genes.gather(1, chosen.indices)
        keys.scatter_(1, own, torch.where(chosen.values > 0, 2.0 + chosen.values, keys.gather(1, own)))
        top = keys.topk(min(config.n_expressed + config.n_silent, x.shape[1]), dim=1)

        shared = torch.randint(x.shape[1], (config.n_shared,), device=x.device)
        targets = torch.cat([top.indices, shared.expand(n, -1)], dim=1)
        return targets, torch.cat([top.values > 0, allowed.expand(n, -1)[:, shared]], dim=1)

    # ---- embedding ---------------------------------------------------------------------------------------------

    def _with_genes(self, adata: AnnData) -> AnnData:
        """Bring the genes into the order of the model; genes that the data lack are never expressed."""
        import anndata

        if not adata.var_names.is_unique:
            raise ValueError("gene names are not unique; call adata.var_names_make_unique() first")
        if list(adata.var_names) == self.genes:
            return adata
        position = pd.Index(self.genes).get_indexer(adata.var_names)
        is_shared = position >= 0
        shared = int(is_shared.sum())
        if not shared:
            raise ValueError(
                f"none of the genes {preview(adata.var_names)} is known to the model, which has {preview(self.genes)}; "
                "use the same kind of gene names"
            )
        logger.info("%d of the %d genes of the data are known to the model", shared, adata.n_vars)

        # entries move to the columns of the model
        entries = to_csr(adata)[:, is_shared].tocoo()
        columns = position[is_shared][entries.col]
        matrix = sparse.csr_matrix((entries.data, (entries.row, columns)), (adata.n_obs, len(self.genes)))
        return anndata.AnnData(matrix, obs=adata.obs, var=pd.DataFrame(index=self.genes))

    @takes_options()
    @torch.no_grad()
    def embed(self, adata: AnnData, *, device: str | None = None) -> AnnData:
        """Encode cells.

        Parameters
        ----------
        adata
            Log expression (log1p of counts per 10 000) of any cells, with some of the genes of the model; its labels
            are not looked at.
        device
            As in :meth:`PerturbationModel.predict`.

        Returns
        -------
        AnnData with embeddings (n, h + 10) in X, float32, and the obs of the given cells; ``uns["invirtuo"]`` names the
        weights, by which `state_transition` distinguishes embeddings of one model from those of another.

        Raises
        ------
        ValueError
            If the model is not fitted, the data are not log expression, or no gene is known.
        """
        import anndata

        self._check_fitted()
        self._check_space(adata)
        x = to_csr(self._with_genes(adata))
        z = np.zeros((adata.n_obs, self.n_embedding), np.float32)
        with self.on_device(device) as chosen:
            codes, allowed = self.gene_codes(), self.known[None]
            for start in range(0, adata.n_obs, CHUNK):
                cells = torch.from_numpy(x[start : start + CHUNK].toarray()).to(chosen)
                # always as many cells at once: the last digits depend on the shape of matrices
                n = len(cells)
                cells = F.pad(cells, (0, 0, 0, CHUNK - n))
                genes, present = self.sentence(cells, allowed)
                encoded, _ = self.encode(cells, genes, present, codes)
                z[start : start + n] = encoded[:n].cpu().numpy()
        var = pd.DataFrame(index=[f"state_{i}" for i in range(z.shape[1])])
        about = {"model": self.name, "preset": self.preset or "", "checkpoint": self.checkpoint()}
        return anndata.AnnData(z, obs=adata.obs.copy(), var=var, uns={"invirtuo": about})

    def checkpoint(self) -> str:
        """Short hash of the weights."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()


def depth(x: Tensor, genes: Tensor, present: Tensor) -> Tensor:
    """Mean log value of the expressed genes of the sentence (n,)."""
    values = x.gather(1, genes) * present
    return values.sum(dim=1) / (values > 0).sum(dim=1).clamp_min(1)
