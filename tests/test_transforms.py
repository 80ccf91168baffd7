"""Formula tests of transforms against scikit-learn and hand-written formulas; contract over TRANSFORMS."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from sklearn import decomposition

from invirtuo.cells.transforms import PCA, TRANSFORMS, Standardize


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return (rng.poisson(3, (40, 6)) @ rng.random((6, 12)) + rng.random((40, 12))).astype(np.float32)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_round_trip(name, x):
    """All that a transform has learned passes through an npz file without pickle."""
    transform = TRANSFORMS[name]().fit(x)
    file = io.BytesIO()
    np.savez(file, **transform.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = TRANSFORMS[name].load(dict(arrays))
    z = transform.forward(torch.from_numpy(x))
    assert torch.equal(again.forward(torch.from_numpy(x)), z)
    assert torch.equal(again.inverse(z), transform.inverse(z))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inverse_undoes_forward(name, x):
    transform = TRANSFORMS[name]().fit(x)
    z = transform.forward(torch.from_numpy(x))
    assert not torch.equal(z, torch.from_numpy(x))
    torch.testing.assert_close(transform.inverse(z), torch.from_numpy(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_unfitted_transforms_say_so(name):
    with pytest.raises(ValueError, match=f"{name} is not fitted yet"):
        TRANSFORMS[name]().state()


def test_fit_does_not_change_its_input(x):
    before = x.copy()
    for transform in TRANSFORMS.values():
        transform().fit(x)
    np.testing.assert_array_equal(x, before)


def test_standardize(x):
    x[:, 3] = 2.0  # a gene that does not vary
    z = Standardize().fit(x).forward(torch.from_numpy(x).double())
    torch.testing.assert_close(z.mean(0), torch.zeros(12).double(), atol=1e-6, rtol=0)
    expected = torch.ones(12).double()
    expected[3] = 0
    torch.testing.assert_close(z.std(0, correction=0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(40, 12), (8, 12)], ids=["tall", "wide"])
def test_pca_is_scikit_learn_s(x, shape):
    x = x[: shape[0]].astype(np.float64)
    mine, theirs = PCA(5).fit(x), decomposition.PCA(5, svd_solver="full").fit(x)
    scores = mine.forward(torch.from_numpy(x)).numpy()
    sign = np.sign((mine.components * theirs.components_).sum(1))
    np.testing.assert_allclose(mine.components, theirs.components_ * sign[:, None], atol=1e-8)
    np.testing.assert_allclose(scores, theirs.transform(x) * sign, atol=1e-7)
    np.testing.assert_allclose(mine.inverse(torch.from_numpy(scores)).numpy(), theirs.inverse_transform(scores * sign))


def test_pca_has_a_fixed_sign_and_a_limit(x):
    first, reversed_rows = PCA(4).fit(x), PCA(4).fit(x[::-1])
    np.testing.assert_allclose(first.components, reversed_rows.components, atol=1e-8)
    largest = np.abs(first.components).argmax(1)
    assert (first.components[np.arange(4), largest] > 0).all()
    assert PCA(50).fit(x).components.shape == (12, 12)
