"""Motion capture: joint angles of a walking person as time courses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["motion_capture"]


def motion_capture(path: str | os.PathLike[str]) -> AnnData:
    """Read subject 35 of the CMU motion capture data as prepared for neural ODEs (``cmu_mocap35.mat``).

    Parameters
    ----------
    path
        MATLAB file with ``Xtr`` (16 sequences), ``Xval`` (3) and ``Xtest`` (4), each (n, 300 frames, 50 channels).

    Returns
    -------
    AnnData with a row per frame: X joint angles, obs ``sequence``, ``frame`` and ``split`` ("train", "val", "test"),
    var ``constant``. Every sequence was centred on its own mean over all frames, which flatters forecasts a little.

    Raises
    ------
    ValueError
        If the file is missing or is another one.

    References
    ----------
    CMU Graphics Lab Motion Capture Database, mocap.cs.cmu.edu; file of Yildiz et al. 2019, arXiv:1905.10994.
    """
    from anndata import AnnData
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        arrays = loadmat(path, variable_names=["Xtr", "Xval", "Xtest"])
        sequences = {"train": arrays["Xtr"], "val": arrays["Xval"], "test": arrays["Xtest"]}
    except (OSError, KeyError, ValueError, NotImplementedError, MatReadError) as error:
        raise ValueError(f"{path} is not the file of motion capture (Xtr, Xval, Xtest): {error}") from error

    # frame after frame, sequence after sequence
    rows, tables = [], []
    for part, x in sequences.items():
        n, frames, channels = x.shape
        rows.append(x.reshape(n * frames, channels))
        names = np.repeat([f"{part}_{i}" for i in range(n)], frames)
        frame = np.tile(np.arange(float(frames)), n)
        tables.append(pd.DataFrame({"sequence": names, "frame": frame, "split": part}))

    obs = pd.concat(tables, ignore_index=True)
    obs.index = [f"{s}_{int(f)}" for s, f in zip(obs["sequence"], obs["frame"], strict=True)]
    values = np.concatenate(rows)
    channels = [f"channel_{i}" for i in range(values.shape[1])]
    var = pd.DataFrame({"constant": values.std(axis=0) < 1e-3}, index=channels)
    return AnnData(values.astype(np.float32), obs=obs, var=var)
