"""Formula tests of the tensor records: rows, devices, what is a control."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from invirtuo.batch import Batch, Condition


def record() -> Batch:
    condition = Condition(
        torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]),
        {"cell": torch.tensor([0, 1, 2])},
        {"time": torch.tensor([0.0, 1.0, 2.0])},
    )
    return Batch(condition, target=torch.arange(6.0).view(3, 2), index=torch.arange(3), set_size=3)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_rows_of_every_tensor(rows):
    whole, part = record(), record()[rows]
    assert torch.equal(part.target, whole.target[rows])
    assert torch.equal(part.index, whole.index[rows])
    assert torch.equal(part.condition.perturbation, whole.condition.perturbation[rows])
    assert torch.equal(part.condition.covariates["cell"], whole.condition.covariates["cell"][rows])
    assert torch.equal(part.condition.continuous["time"], whole.condition.continuous["time"][rows])
    assert part.source is None and part.set_size == 3
    assert len(part) == len(whole.target[rows])


def test_move_to_a_device():
    moved = record().to("meta")
    assert isinstance(moved, Batch)
    tensors = [moved.target, moved.index, moved.condition.perturbation, moved.condition.covariates["cell"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_controls_are_rows_of_zeros():
    assert record().condition.is_control.tolist() == [True, False, False]


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().set_size = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().condition.perturbation = torch.zeros(1, 1)


def test_unperturbed_cells_are_controls_in_everything_that_a_network_is_told():
    """Also in features, which stand for the perturbation where a Design has them."""
    condition = Condition(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), features=torch.tensor([[0.5, -1.0], [3.0, 0.0]]))
    assert condition.unperturbed().is_control.all() and not condition.unperturbed().code.any()
    first = condition.unperturbed(torch.tensor([True, False]))
    assert first.is_control.tolist() == [True, False]
    assert not first.code[0].any() and torch.equal(first.code[1], condition.code[1])
