"""Pictures of cells, genes, scores and dynamics: each draws on matplotlib axes, and gives them back.

>>> import matplotlib
>>> matplotlib.use("Agg")
>>> import invirtuo as iv
>>> cells = iv.preprocess.normalize(iv.datasets.toy())
>>> ax = iv.pl.gene("gene_0", {"all cells": cells})
"""

from invirtuo.plots.cells import cells, gene
from invirtuo.plots.dynamics import courses, network
from invirtuo.plots.effects import effects, volcano
from invirtuo.plots.scores import history, scores

__all__ = ["cells", "courses", "effects", "gene", "history", "network", "scores", "volcano"]
