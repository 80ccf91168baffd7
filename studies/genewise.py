"""The gene-wise velocity network on a CPU: a training step, and an evaluation in tiles beside the plain form.

    python benchmarks/genewise.py

The plain form is the one that training uses: sinusoids computed for every value, all activations of a batch at once.
With a C++ compiler a step is also taken with the network compiled (`FitConfig(compile=True)`).
CPU seconds, bf16, one thread, medians; forms that are compared take turns.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.models import PRiMeFlow


def measured(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each, taking turns after a warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for own, function in zip(seconds, functions, strict=True):
            start = time.process_time()
            function()
            own.append(time.process_time() - start)
    return [1000 * statistics.median(own[1:]) for own in seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a step and both forms of an evaluation for several numbers of genes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="*", default=[500, 2000, 5575])
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for n_genes in args.genes:
        adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=2 * args.cells, n_genes=n_genes))
        design = iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["cell_type"])
        model, dataset = PRiMeFlow(design, adata.var_names), iv.CellDataset(adata, design)
        model.prepare(dataset)
        batch = dataset.take(np.arange(args.cells))
        compiled = copy.deepcopy(model)
        compiled.velocity.compile()
        network = copy.deepcopy(model.velocity).to(torch.bfloat16)
        x, t = torch.randn(args.cells, n_genes), torch.full((args.cells,), 0.5)

        def steps(model: PRiMeFlow, batch=batch) -> Callable[[], None]:
            optimizer = torch.optim.Adam(model.parameters(), fused=True)

            def step() -> None:
                optimizer.zero_grad()
                model.train().loss(batch)["total"].backward()
                optimizer.step()

            return step

        def evaluation(model=model, batch=batch, network=network, x=x, t=t) -> None:
            model.eval().evaluate(x, t, batch.condition, network=network)

        with torch.autocast("cpu", torch.bfloat16):
            if shutil.which("g++"):
                trained, fused = measured(steps(model), steps(compiled), repeats=args.repeats)
            else:
                (trained,), fused = measured(steps(model), repeats=args.repeats), math.nan
            plain, tiled = measured(evaluation, torch.no_grad()(evaluation), repeats=args.repeats)
        rows.append((n_genes, trained, fused, trained / fused, plain, tiled, plain / tiled))
    columns = ["genes", "training step, ms", "compiled, ms", "ratio", "evaluation, plain, ms", "in tiles, ms", "ratio "]
    print(pd.DataFrame(rows, columns=columns).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
