"""The least that each hot path could take on this processor, beside what it takes.

Counted of each: floating-point operations of matrix products (in bf16 and in fp32), values that must be sorted, random
numbers that must be drawn, and the fewest bytes that must be read and written, if whatever fits a cache stays there.
Measured before each, in its process: how fast this processor does these alone. The floor is the larger of two times,
that of the operations one after the other and that of the bytes. CPU seconds, one thread.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import invirtuo as iv
from invirtuo.bench import Entry
from invirtuo.metrics.measures.wilcoxon import rank_sum
from invirtuo.metrics.numerics.distances import between, cloud
from invirtuo.models.sparse_ode.systems import simulate
from invirtuo.nn.linear import products
from studies import generate, metrics, rivals, scale
from studies.harness import Rows, Tables, apart, in_turn, spent, study

GENES = (500, 2000, 5575, 18_000)  # sizes of the gene-wise network
STEPS, REPEATS = 12, 5  # timed steps of a fit, and calls of everything else; the median counts
EVALUATED, STORED, GENERATED, COUNTED = 256, 100_000, 20_000, 512  # cells: a batch, on disk, drawn and so counted
COPIES = 12  # of the weights in a step: read twice, gradients both ways, Adam's three and the average both ways
MODELS: dict[str, tuple[str, Any]] = {  # of which a training step is measured
    "gene-wise": ("primeflow", None),
    "U-Net": ("primeflow", "small"),
    "state_transition": ("state_transition", None),
    "cfgen": ("cfgen", None),
    "sparse_ode": ("sparse_ode", "series"),
}
Work = Counter  # operations in "bf16" and "fp32", values "sorted" and "drawn", "bytes" moved


class Measured(NamedTuple):
    """A hot path: its name, the seconds that it takes, and the work that it cannot do without."""

    name: str
    seconds: float
    work: Work


@study(quick={"paths": ["gene-wise"], "genes": [50]})
def floors(*, out: Path, paths: Sequence[str] = (), genes: Sequence[int] = GENES) -> Tables:
    """The floor of every hot path by operations and bytes, beside what it takes.

    Parameters
    ----------
    paths
        Hot paths, by default all: gene-wise, evaluation, U-Net, state_transition, cfgen, sparse_ode, judging, reading,
        generating.
    genes
        Sizes of the gene-wise network and of its evaluation; everything else has 2,000 genes, the U-Net 500.
    """
    sizes = dict.fromkeys(PATHS, (2000,)) | {"gene-wise": genes, "evaluation": genes, "U-Net": (500,)}
    cases = [{"path": path, "genes": size} for path in paths or PATHS for size in sizes[path]]
    table = Rows(out / "rows.csv").fill(cases, lambda path, genes: apart(measured, path=path, genes=genes)["rows"])
    return {"floors": table}


def measured(path: str, genes: int) -> dict[str, list[dict]]:
    """Rows of a path; in a process of its own."""
    best = ceilings()
    rows = []
    for name, seconds, work in PATHS[path](genes):
        least = floor(work, best)
        row = {"what": name, **least, "seconds": seconds, "times the floor": seconds / least["floor"]}
        rows.append(row | {kind: float(work[kind]) for kind in best} | {f"best {kind}": best[kind] for kind in best})
    return {"rows": rows}


# ---- what the processor can do -----------------------------------------------------------------------------------


def ceilings(repeats: int = 7) -> dict[str, float]:
    """Operations, values and bytes a CPU second: the best of several."""
    rng = np.random.default_rng(0)
    half, single = (torch.randn(2048, 2048, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    columns = rng.random((1000, 2000), dtype=np.float32)
    large = np.ones(1 << 26, np.float32)
    target, noise = np.empty_like(large), torch.empty(1 << 22)
    alone: dict[str, tuple[int, Callable[[], Any]]] = {
        "bf16": (2 * 2048**3, lambda: half @ half),
        "fp32": (2 * 2048**3, lambda: products(single, single)),
        "sorted": (columns.size, lambda: np.sort(columns)),
        "drawn": (noise.numel(), noise.uniform_),
        "bytes": (2 * large.nbytes, lambda: np.copyto(target, large)),
    }
    seconds = in_turn({name: function for name, (_, function) in alone.items()}, repeats).min()
    return {name: amount / seconds[name] for name, (amount, _) in alone.items()}


def floor(work: Work, best: dict[str, float]) -> dict[str, float | str]:
    """The larger of the seconds of operations and of bytes, and which it is."""
    times = {name: work[name] / best[name] for name in best}
    moved = times.pop("bytes")
    done = sum(times.values())
    return {"floor": max(moved, done), "bound by": "bytes" if moved > done else max(times, key=times.__getitem__)}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products by their precision."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function._overloadpacket
        if packet not in flop_registry:
            with self:
                found = function.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        result = function(*args, **kwargs)
        if packet in flop_registry:
            dtype = next(value.dtype for value in args if isinstance(value, torch.Tensor))
            name = "bf16" if dtype is torch.bfloat16 else "fp32"
            self.work[name] += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


# ---- hot paths ---------------------------------------------------------------------------------------------------


def median(function: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    return float(in_turn({"call": function}, REPEATS)["call"].median())


class Steps(lightning.Callback):
    """CPU seconds of the steps of every stage of a fit; the last step is counted instead."""

    def __init__(self) -> None:
        self.stages: list[tuple[float, Work]] = []

    def on_train_start(self, trainer, module) -> None:
        self.ends: list[float] = []
        self.products = Products()

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        self.is_last = trainer.global_step == trainer.max_steps - 1
        if self.is_last:
            self.products.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if not self.is_last:
            self.ends.append(time.process_time())
            return
        self.products.__exit__(None, None, None)
        weights = sum(weight.numel() for weight in module.model.parameters() if weight.requires_grad)
        copies = COPIES if module.average is not None else COPIES - 2
        self.stages.append((float(np.median(np.diff(self.ends))), self.products.work))
        self.products.work["bytes"] = 4 * copies * weights + batch.target.nbytes


def toy(genes: int, *, counts: bool) -> tuple[Any, iv.Design]:
    """Cells with perturbations, log values or counts."""
    cells = iv.datasets.toy(n_cells=2 * EVALUATED, n_genes=genes)
    cells = cells if counts else iv.preprocess.normalize(cells)
    return cells, iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


def training(model: str, genes: int) -> Iterator[Measured]:
    """A step of every stage of a fit."""
    label, settings = MODELS[model]
    if label == "sparse_ode":
        cells = simulate("linear_grn", noise=0.05)
        design = iv.Design.from_adata(cells, covariates=["course"], time="time")
    else:
        cells, design = toy(genes, counts=label == "cfgen")
    made, config = Entry(model, label, settings).make(design, cells.var_names)
    stages = list(made.stages(config))
    clock = Steps()
    config = replace(config, steps=len(stages) * STEPS, val_every=0, progress=False)
    made.fit(cells, config=config, callbacks=[clock])
    for stage, (seconds, work) in zip(stages, clock.stages, strict=True):
        yield Measured(f"{model}, {stage} step" if len(stages) > 1 else f"{model}, step", seconds, work)


def evaluation(genes: int) -> Iterator[Measured]:
    """An evaluation of the gene-wise network, as sampling takes ten of them."""
    cells, design = toy(genes, counts=False)
    model, dataset = iv.models.PRiMeFlow(design, cells.var_names), iv.CellDataset(cells, design)
    model.prepare(dataset)
    condition = dataset.take(np.arange(EVALUATED)).condition
    network = model.eval().velocity.to(torch.bfloat16)
    x, t = torch.randn(EVALUATED, genes), torch.full((EVALUATED,), 0.5)

    @torch.no_grad()
    def evaluate() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model.evaluate(x, t, condition, network=network)

    with Products() as counted:
        evaluate()
    weights = sum(weight.nbytes for weight in network.parameters())
    yield Measured("gene-wise, evaluation", median(evaluate), counted.work + Counter(bytes=weights + 2 * x.nbytes))


def judging(genes: int) -> Iterator[Measured]:
    """Distances between populations, rank-sum tests, the six metrics of 2026."""
    pred, real = (metrics.screen(seed, 20, 200, 2000, genes, counts=True) for seed in (1, 2))

    # products of all pairs of cells
    x, y = (side.X[:2000].toarray() for side in (pred, real))
    clouds = [cloud(cells, x.mean(axis=0)) for cells in (x, y)]
    work = Counter(fp32=2 * len(x) * len(y) * genes, bytes=x.nbytes + y.nbytes)
    yield Measured("distances of 2,000 to 2,000 cells", median(lambda: between(*clouds)), work)

    # every value above zero is sorted once within its gene
    control, *groups = (real.X[(real.obs["gene"] == name).to_numpy()] for name in real.obs["gene"].unique())
    work = Counter(sorted=real.X.nnz, bytes=8 * real.X.nnz)
    yield Measured("rank-sum tests of 20 x 200 to 2,000 cells", median(lambda: rank_sum(groups, control)), work)
    design = iv.Design.from_adata(real, perturbation="gene", control="control")
    values = real.X.nnz + pred.X.nnz
    seconds = median(lambda: iv.metrics.vcc2026(pred, real, design, target_genes={"*": None}, bulk_target_sum=1000))
    yield Measured("vcc2026 of the same", seconds, Counter(sorted=values, bytes=8 * values))


def reading(genes: int) -> Iterator[Measured]:
    """A pass over the cells of a shuffled store: cells, cells beside controls, sets of both."""
    with tempfile.TemporaryDirectory() as folder:
        scale.make(Path(folder), out=Path(folder) / "out", cells=STORED)
        values = (scale.LEAST_VALUES + scale.MOST_VALUES) / 2
        of_a_cell = 8 * values + 4 * scale.N_GENES  # sparse in the file, dense in a batch
        for case, copies in (("store", 1), ("pairs", 2), ("sets", 2)):
            seconds = scale.one_pass(case, folder, "256 MiB")["cpu_seconds"]
            work = Counter(bytes=copies * STORED * of_a_cell)
            yield Measured(f"{STORED:,} cells from disk, {case}", seconds, work)


def generating(genes: int) -> Iterator[Measured]:
    """Counts of the CFGen drawn into a file."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "generated.h5ad"
        model = generate.fitted("cfgen", generate.training_cells())
        with Products() as counted:
            model.generate(COUNTED)
        with spent() as cost:
            model.generate(GENERATED, out=made, chunk_size=rivals.CHUNK)
        drawn = Counter(drawn=GENERATED * generate.N_GENES, bytes=made.stat().st_size)
        products = {kind: count * GENERATED // COUNTED for kind, count in counted.work.items()}
        work = drawn + Counter(products)
    yield Measured(f"cfgen, {GENERATED:,} cells into a file", cost["cpu_seconds"], work)


PATHS: dict[str, Callable[[int], Iterator[Measured]]] = {
    **{model: partial(training, model) for model in MODELS},
    "evaluation": evaluation,
    "judging": judging,
    "reading": reading,
    "generating": generating,
}
