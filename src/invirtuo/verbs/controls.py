"""Control cells that a model keeps, to start from when it draws cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

__all__ = ["ControlCells"]


@dataclass(frozen=True, eq=False)
class ControlCells:
    """Control cells of one covariate group.

    Parameters
    ----------
    expression
        (n, g)
    embedding
        (n, d), of models that read an entry of obsm beside expression.
    """

    expression: sparse.csr_matrix
    embedding: np.ndarray | None = None

    def __len__(self) -> int:
        n: int = self.expression.shape[0]
        return n

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Expression (m, g) and embedding (m, d) of rows."""
        embedding = None if self.embedding is None else torch.from_numpy(self.embedding[rows])
        return torch.from_numpy(self.expression[rows].toarray()), embedding

    @classmethod
    def joined(cls, pieces: Sequence[Self]) -> Self:
        """The cells of all pieces."""
        embeddings = [piece.embedding for piece in pieces if piece.embedding is not None]
        expression = sparse.vstack([piece.expression for piece in pieces], format="csr")
        return cls(expression, np.concatenate(embeddings) if embeddings else None)

    def state(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        arrays = {name: getattr(self.expression, name) for name in ("data", "indices", "indptr")}
        return arrays if self.embedding is None else arrays | {"embedding": self.embedding}

    @classmethod
    def load(cls, state: Mapping[str, np.ndarray], n_genes: int, n_embedding: int = 0) -> Self:
        """From what :meth:`state` gave.

        Models were once saved with the embedding behind the genes: what lies above 0, and then what lies below.
        """
        is_behind = n_embedding > 0 and "embedding" not in state
        shape = len(state["indptr"]) - 1, n_genes + 2 * n_embedding * is_behind
        cells = sparse.csr_matrix((state["data"], state["indices"], state["indptr"]), shape)
        cells.check_format(full_check=True)  # indices out of bounds would read foreign memory
        if not is_behind:
            embedding = state.get("embedding")
            if embedding is not None and embedding.shape != (shape[0], n_embedding):
                raise ValueError(f"embedding has shape {embedding.shape}; expected {(shape[0], n_embedding)}")
            return cls(cells, embedding)
        above, below = np.split(cells[:, n_genes:].toarray(), 2, axis=1)
        return cls(cells[:, :n_genes], above - below)
