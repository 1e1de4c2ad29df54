"""Attention and rotary positions against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfbench.attention import attend, rotate, rotations
from tests.tiny import distance, normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_of_scaled_products(masked: bool) -> None:
    q, k, v = normal(2, 5, 3, 8, seed=1), normal(2, 7, 3, 8, seed=2), normal(2, 7, 3, 8, seed=3)
    mask = normal(5, 7, seed=4) > 0 if masked else None
    if mask is not None:
        mask[:, 0] = True  # nobody is left without a key
    found = attend(q, k, v, mask)
    for batch in range(2):
        for head in range(3):
            scores = q[batch, :, head].double() @ k[batch, :, head].double().T / math.sqrt(8)
            if mask is not None:
                scores[~mask] = -math.inf
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            assert distance(found[batch, :, head], weights @ v[batch, :, head].double()) < 1e-6


@pytest.mark.parametrize("head_dim", [12, 16, 32, 128])
def test_rotation_turns_each_pair_by_position_times_frequency(head_dim: int) -> None:
    frames, height, width = (3, 0, 7), 2, 3
    x = normal(1, len(frames) * height * width, 2, head_dim)
    found = rotate(x, rotations(frames, height, width, head_dim, CPU))
    side = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * side, side, side)
    token = 0
    for frame in frames:
        for row in range(height):
            for column in range(width):
                pair = 0
                for position, size in zip((frame, row, column), sizes, strict=True):
                    for i in range(size // 2):
                        angle = position * 10000.0 ** (-2 * i / size)
                        a, b = x[0, token, :, 2 * pair].double(), x[0, token, :, 2 * pair + 1].double()
                        turned = torch.stack([a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)])
                        assert distance(found[0, token, :, 2 * pair : 2 * pair + 2].T, turned) < 1e-6
                        pair += 1
                assert pair == head_dim // 2
                token += 1


@settings(max_examples=25)
@given(first=st.integers(0, 400), second=st.integers(0, 400), shift=st.integers(0, 600))
def test_products_depend_on_distance_alone(first: int, second: int, shift: int) -> None:
    q, k = normal(1, 1, 1, 24, seed=first), normal(1, 1, 1, 24, seed=1000 + second)

    def product(a: int, b: int) -> float:
        return float((rotate(q, rotations((a,), 1, 1, 24, CPU)) * rotate(k, rotations((b,), 1, 1, 24, CPU))).sum())

    assert abs(product(first, second) - product(first + shift, second + shift)) < 1e-4


def test_rotation_keeps_the_dtype_and_does_its_work_in_float32() -> None:
    x, rotation = normal(1, 4, 2, 16).bfloat16(), rotations((900,), 2, 2, 16, CPU)
    found = rotate(x, rotation)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), rotation).bfloat16())
