"""Attention and rotary positions against their formulas, written out."""

from __future__ import annotations

import math
import sys
import types
import typing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfbench import attention, proof
from rfbench.attention import attend, rotate, rotations
from rfbench.errors import UserError
from rfbench.settings import FastCfg
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


def has(monkeypatch: pytest.MonkeyPatch, *modules: str, capability: tuple[int, int] = (9, 0)) -> None:
    """A machine with a GPU and some packages."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in modules)


@pytest.mark.parametrize(
    ("modules", "capability", "wanted"),
    [
        (("flash_attn_interface", "cudnn", "flash_attn"), (9, 0), "fa3"),
        (("fa3_fwd_interface",), (9, 0), "fa3"),
        (("flash_attn_interface", "cudnn"), (8, 0), "cudnn"),
        (("flash_attn_interface", "cudnn"), (10, 0), "cudnn"),
        (("cudnn", "flash_attn"), (9, 0), "cudnn"),
        (("flash_attn",), (8, 9), "fa2"),
        (("flash_attn", "cudnn"), (7, 5), "torch-sdpa"),
        ((), (9, 0), "torch-sdpa"),
    ],
)
def test_the_kernel_is_chosen_by_what_the_device_can_do(
    modules: tuple[str, ...], capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, *modules, capability=capability)
    monkeypatch.setattr(attention, "proves_itself", lambda name, device: True)
    assert attention.choose("auto", torch.device("cuda", 0)) == wanted
    assert attention.choose("auto", CPU) == "torch-sdpa"


def test_a_kernel_that_fails_or_is_off_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing", lambda name, device: None)
    monkeypatch.setattr(proof, "left_out", {})
    plain = attention.KERNELS["torch-sdpa"]
    broken = {"fa3": lambda q, k, v, mask: 1 / 0, "cudnn": lambda q, k, v, mask: 1.02 * plain(q, k, v, mask)}
    for name, kernel in broken.items():
        monkeypatch.setitem(attention.KERNELS, name, kernel)
    monkeypatch.setitem(attention.KERNELS, "fa2", plain)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert attention.choose("auto", device) == "fa2"
    assert list(proof.left_out) == ["attention.fa3", "attention.cudnn"]
    assert "ZeroDivisionError" in proof.left_out["attention.fa3"] and "apart from its plain form" in proof.left_out["attention.cudnn"]


def test_a_kernel_that_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "cudnn", capability=(8, 0))
    gpu = torch.device("cuda", 0)
    assert [attention.choose(name, gpu) for name in ("cudnn", "torch-sdpa", "math")] == ["cudnn", "torch-sdpa", "math"]
    with pytest.raises(UserError, match=r"'fa3' needs compute capability 9\.0 and this device has 8\.0"):
        attention.choose("fa3", gpu)
    with pytest.raises(UserError, match="'fa2' needs package flash_attn"):
        attention.choose("fa2", gpu)
    with pytest.raises(UserError, match="'cudnn' needs a CUDA device and this is 'cpu'"):
        attention.choose("cudnn", CPU)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """As the packages have it: [B, S, H, D], half precision, heads of 256 at most."""
    assert q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16) and not causal and softmax_scale is None
    assert k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:]) and q.shape[-1] % 8 == 0
    weights = torch.einsum("bshd,bkhd->bhsk", q.double(), k.double()).div(math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhsk,bkhd->bshd", weights, v.double()).to(v.dtype)


@pytest.mark.parametrize(
    ("name", "module", "pair"), [("fa3", "flash_attn_interface", True), ("fa3", "fa3_fwd_interface", False), ("fa2", "flash_attn", False)]
)
def test_packages_are_called_as_they_are_declared(name: str, module: str, pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = list[int]()

    def stand_in(*tensors: Any, **options: Any) -> Any:
        called.append(1)
        out = flash_attn_func(*tensors, **options)
        return (out, None) if pair else out

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_func=stand_in))
    has(monkeypatch, module)
    if name == "fa3":
        monkeypatch.setattr(attention, "FA3", (module,))
    monkeypatch.setattr(attention, "kernel", lambda device: name)
    q, k, v = (normal(2, size, 3, 8, seed=size).bfloat16() for size in (5, 7, 7))
    wanted = attention.KERNELS["math"](q.double(), k.double(), v.double(), None)
    assert distance(attend(q, k, v).double(), wanted) < 5e-3 and called
    called.clear()
    mask = torch.ones(5, 7, dtype=torch.bool)
    for other in ((q, k, v, mask), (q.float(), k.float(), v.float()), (q.requires_grad_(), k, v), (q.repeat(1, 1, 1, 17),) * 3):
        assert attend(*other).shape[:3] == other[0].shape[:3]
    assert not called, "these are for torch's own choice"


@pytest.mark.parametrize("name", ["torch-sdpa", "math"])
def test_kernels_that_run_anywhere_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel", lambda device: name)
    q, k, v = normal(2, 5, 3, 8, seed=1), normal(2, 7, 3, 8, seed=2), normal(2, 7, 3, 8, seed=3)
    weights = torch.einsum("bshd,bkhd->bhsk", q.double(), k.double()).div(math.sqrt(8)).softmax(-1)
    assert distance(attend(q, k, v), torch.einsum("bhsk,bkhd->bshd", weights, v.double())) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", attention.KERNELS)
def test_every_kernel_of_this_gpu_agrees_with_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of a chunk of Wan2.1: 3 latent frames that look at 9."""
    device = torch.device("cuda", 0)
    if (why := attention.missing(name, device)) is not None:
        pytest.skip(why)
    q, k, v = (normal(1, size, 12, 128, seed=size).to(device, torch.bfloat16) for size in (4680, 14040, 14040))
    monkeypatch.setattr(attention, "kernel", lambda device: name)
    assert distance(attend(q, k, v).float(), attention.KERNELS["torch-sdpa"](q.float(), k.float(), v.float(), None)) < 1e-2


def test_every_name_of_the_setting_is_a_kernel() -> None:
    (choices,) = (typing.get_args(hint) for name, hint in typing.get_type_hints(FastCfg).items() if name == "attention")
    assert set(choices) == {"auto", *attention.KERNELS}
