"""Sigmas, timesteps and conversions against their formulas and as inverses of each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfbench.schedule import Schedule, add_noise, flow_to_x0, shifted, x0_to_flow
from tests.tiny import distance, normal

SHIFTS = st.floats(0.5, 12)


def test_a_shift_of_one_changes_nothing() -> None:
    u = torch.linspace(0, 1, 11)
    assert torch.equal(shifted(u, 1.0), u)


@settings(max_examples=50)
@given(SHIFTS, st.floats(0.001, 0.999))
def test_the_shift_multiplies_the_odds(shift: float, u: float) -> None:
    """k u / (1 + (k - 1) u) is the number whose odds are k times those of u."""
    sigma = float(shifted(torch.tensor(u, dtype=torch.float64), shift))
    assert math.isclose(sigma / (1 - sigma), shift * u / (1 - u), rel_tol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_the_table_falls_from_noise_to_almost_data(shift: float) -> None:
    schedule = Schedule(shift)
    assert schedule.sigmas.shape == (1000,) and float(schedule.sigmas[0]) == 1.0
    assert (schedule.sigmas.diff() < 0).all() and 0 < float(schedule.sigmas[-1]) < 0.01
    assert torch.equal(schedule.timesteps, 1000 * schedule.sigmas)
    weights = schedule.training_weights
    assert math.isclose(float(weights.sum()), 1000, rel_tol=1e-9) and float(weights.min()) == 0
    assert abs(float(schedule.timesteps[weights.argmax()]) - 500) < 3


@settings(max_examples=50)
@given(SHIFTS, st.lists(st.floats(0, 1000), min_size=1, max_size=5))
def test_a_timestep_takes_the_nearest_entry(shift: float, t: list[float]) -> None:
    schedule = Schedule(shift)
    table = schedule.timesteps.tolist()
    for found, sigma, wanted in zip(schedule.index(torch.tensor(t)).tolist(), schedule.sigma(torch.tensor(t)).tolist(), t, strict=True):
        rounded = float(torch.tensor(wanted))
        assert abs(table[found] - rounded) == min(abs(entry - rounded) for entry in table)
        assert sigma == float(schedule.sigmas[found])


def test_step_lists_are_looked_up_in_the_shifted_table() -> None:
    schedule = Schedule(5.0)
    assert schedule.warp((1000, 750, 500, 250, 0)) == pytest.approx((1000, 937.5, 833.3333333, 625, 0))
    assert Schedule(1.0).warp((1000, 757, 1)) == pytest.approx((1000, 757, 1))
    assert schedule.spaced(4) == pytest.approx(schedule.warp((1000, 750, 500, 250)))
    assert len(schedule.spaced(24)) == 24


@settings(max_examples=30)
@given(SHIFTS, st.floats(5, 1000), st.integers(0, 99))
def test_conversions_undo_each_other(shift: float, t: float, seed: int) -> None:
    x0, noise = normal(2, 3, 1, 2, 2, seed=seed), normal(2, 3, 1, 2, 2, seed=seed + 1)
    sigma = Schedule(shift).sigma(torch.full((2, 3), t))
    noisy = add_noise(x0, noise, sigma)
    assert distance(noisy, (1 - sigma[..., None, None, None]) * x0 + sigma[..., None, None, None] * noise) < 1e-6
    assert distance(flow_to_x0(noise - x0, noisy, sigma), x0) < 1e-5
    assert distance(x0_to_flow(flow_to_x0(noise, noisy, sigma), noisy, sigma), noise) < 1e-3  # divides rounding by a small sigma
    assert add_noise(x0.bfloat16(), noise, sigma).dtype == torch.bfloat16
