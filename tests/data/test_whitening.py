"""ZCA of real images: equal to its definition, undone exactly, and the same for an image whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage

import ddkit
from ddkit.data.whitening import NAMES, Whitening, whitening_of
from ddkit.recipes.tables import DataTable

SHAPE = (2, 3, 4)


def images(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.rand(count, *SHAPE, generator=draw) * torch.linspace(0.1, 1, 24).view(SHAPE)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("count", [5, 60])
def test_it_is_the_inverse_root_of_the_covariance_with_fewer_and_with_more_images_than_numbers(count: int, absolute: bool) -> None:
    real, eps = images(count), 0.1
    rows = real.flatten(1).double()
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / count
    regular = eps if absolute else eps * covariance.diag().mean()
    values, vectors = torch.linalg.eigh(covariance + regular * torch.eye(24, dtype=torch.float64))
    wanted = centred @ vectors @ values.rsqrt().diag() @ vectors.T
    made = whitening_of(real, DataTable(whiten=True, whiten_eps=eps, whiten_absolute=absolute))
    found = made.whiten(real)
    torch.testing.assert_close(found.flatten(1).double(), wanted, atol=0.02, rtol=0.005)  # directions of next to no variance are left out
    torch.testing.assert_close(made.undo(found), real, atol=1e-5, rtol=0)
    assert len(made.vectors) <= min(count, 24)
    again = Whitening.taken(dict(made.tensors), SHAPE)
    assert again is not None
    assert torch.equal(again.whiten(real), found)


def test_an_image_is_whitened_to_the_same_bytes_whatever_stands_beside_it() -> None:
    real = images(150)
    made = whitening_of(real, DataTable(whiten=True))
    whole = made.whiten(real)
    for first, last in ((0, 1), (1, 70), (63, 65), (149, 150)):
        assert torch.equal(made.whiten(real[first:last]), whole[first:last])


def test_of_few_images_it_is_regularised_as_much_more_as_ledoit_and_wolf_shrink_their_covariance() -> None:
    for count in (6, 40, 400):
        real = images(count)
        rows = real.flatten(1).double()
        shrinkage = float(ledoit_wolf_shrinkage(rows.numpy()))
        variance = float((rows - rows.mean(0)).square().mean())
        found = whitening_of(real, DataTable(whiten=True)).facts["regularisation"] / variance
        assert found == pytest.approx(0.1 + shrinkage / (1 - shrinkage), rel=1e-4)


def test_images_that_do_not_differ_and_tensors_that_are_no_whitening_are_refused() -> None:
    with pytest.raises(ddkit.InputError, match="are the same"):
        whitening_of(torch.full((4, *SHAPE), 0.5), DataTable(whiten=True))
    good = whitening_of(images(5), DataTable(whiten=True)).tensors
    vectors = good[NAMES[1]]
    for change in ({NAMES[1]: vectors[:, 1:]}, {NAMES[1]: vectors * torch.inf}, {NAMES[2]: -good[NAMES[2]]}, {NAMES[0]: torch.zeros(2)}):
        with pytest.raises(ValueError, match="whitening"):
            Whitening.taken(good | change, SHAPE)
    with pytest.raises(ValueError, match="missing"):
        Whitening.taken({NAMES[1]: vectors}, SHAPE)
    assert Whitening.taken({"images": vectors}, SHAPE) is None
