"""scVI (scvi-tools 1.4.2, BSD 3-Clause): control cells moved in latent space, or decoded under the perturbation.

``scvi_latent.py FOLDER shift``: the mean difference of perturbed and control cells of a covariate group, averaged over
groups, is added to latent control cells, as scGen does. ``... swap``: the perturbation is scVI's batch, and control
cells are decoded under the wanted one. Counts are drawn from the likelihood, at the depth of the control cell.

Lopez et al. 2018, doi:10.1038/s41592-018-0229-2; Lotfollahi et al. 2019, doi:10.1038/s41592-019-0494-8.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["scvi-tools==1.4.2", "torch==2.13.0", "anndata==0.12.19"]
# ///

from __future__ import annotations

import sys

import folder
import numpy as np
import scvi
import torch

EPOCHS = 20


def shifts(question: folder.Question, latent: np.ndarray) -> dict[str, np.ndarray]:
    """Perturbation to the mean difference of its latent cells (n, d) to control cells, the mean over groups."""
    obs = question.train.obs
    groups, labels = question.groups(obs), obs[question.perturbation].astype(str).to_numpy()
    is_control = question.is_control(obs)
    found: dict[str, list[np.ndarray]] = {}
    for group in np.unique(groups):
        own = groups == group
        for label in np.unique(labels[own & ~is_control]):
            start = latent[own & is_control].mean(axis=0)
            found.setdefault(label, []).append(latent[own & (labels == label)].mean(axis=0) - start)
    return {label: np.mean(vectors, axis=0) for label, vectors in found.items()}


def shift(question: folder.Question, moved: dict[str, np.ndarray], label: str) -> np.ndarray:
    """What moves cells to a perturbation; a combination that was never seen moves by the sum of its parts."""
    if label in moved:
        return moved[label]
    known = [moved[part] for part in question.parts(label) if part in moved]
    if len(known) < len(question.parts(label)):
        raise SystemExit(f"no training cell has a part of {label}")
    return np.sum(known, axis=0)


def main(path: str, how: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    scvi.settings.seed = question.seed
    batch = question.perturbation if how == "swap" else None
    scvi.model.SCVI.setup_anndata(question.train, layer="counts", batch_key=batch)
    model = scvi.model.SCVI(question.train, gene_likelihood="nb")
    model.train(max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False)

    # latent control cells, one for each wanted cell
    obs, start = folder.starting_cells(question)
    z = model.get_latent_representation(start)
    wanted = obs[question.perturbation].astype(str)
    code = np.zeros((len(obs), 1))
    if how == "swap":
        names = list(model.adata_manager.get_state_registry("batch").categorical_mapping)
        if unknown := set(wanted).difference(names):
            raise SystemExit(f"never seen, so no batch of scVI: {', '.join(sorted(unknown))}")
        code = np.array([[names.index(label)] for label in wanted])
    else:
        moved = shifts(question, model.get_latent_representation())
        z = z + np.stack([shift(question, moved, label) for label in wanted])

    # counts at the depth of the control cells
    depth = np.asarray(start.layers["counts"].sum(axis=1)).reshape(-1, 1)
    torch.manual_seed(question.seed)
    with torch.inference_mode():
        drawn = model.module.generative(
            z=torch.tensor(z, dtype=torch.float32),
            library=torch.tensor(np.log(depth), dtype=torch.float32),
            batch_index=torch.tensor(code),
        )
        counts = drawn["px"].sample().numpy()
    obs["total_counts"] = start.obs["total_counts"].to_numpy()
    folder.write(question, counts, obs, "counts")


if __name__ == "__main__":
    main(*sys.argv[1:])
