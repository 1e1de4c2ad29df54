"""What a training step is made of: its arithmetic against closed forms and torch's own counter, its phases, what roles hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rfbench import anatomy, flops, records
from rfbench.anatomy import Arithmetic, Step, summary
from rfbench.errors import UserError
from rfbench.memory import held
from tests.test_profiling import switch_off
from tests.test_train import EMA, FORCED, recipe, tiny, write
from tests.tiny import CFG, Tiny, normal

__all__ = ["tiny"]  # a fixture
PASSED = {"rollout", "critic", "backward", "communication", "optimiser", "all"}


def test_arithmetic_is_that_of_products_and_attention() -> None:
    weight, x = normal(5, 7).requires_grad_(), normal(3, 7).requires_grad_()
    counted = Arithmetic()
    with counted:
        counted.mark("rollout")
        with torch.no_grad():
            functional.linear(x, weight)
        out = functional.linear(x, weight, normal(5).requires_grad_()) + functional.linear(x, weight.detach())
        counted.mark("reward")
        functional.scaled_dot_product_attention(normal(2, 3, 11, 4), normal(2, 3, 13, 4), normal(2, 3, 13, 4))
        counted.mark("backward")
        with FlopCounterMode(display=False) as other:
            out.sum().backward()
    product = 2 * 3 * 5 * 7
    assert counted.found == {"rollout": 3 * product, "reward": 2 * 3 * 4 * 11 * 13 * 4, "backward": other.get_total_flops()}
    assert other.get_total_flops() == 3 * product, "two factors, then one"


def test_what_is_recomputed_counts_once(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        path = write(tmp_path, "redmd", steps=1, checkpointing=checkpointing)
        run = anatomy.profile(path, name=f"{checkpointing}", repeats=1)
        found.append({kind: {name: row["tflop"] for name, row in rows.items()} for kind, rows in anatomy.document(run)["steps"].items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(("more", "random_weights"), [({}, False), ({}, True), ({"rollout": FORCED, "data": {"clips": 3}}, False)])
def test_a_step_is_taken_apart(more: dict[str, object], random_weights: bool, tmp_path: Path, folders: Path) -> None:
    path = write(tmp_path, "redmd", **more)
    directory = anatomy.profile(path, ["accumulate=2"], name="x", repeats=2, random_weights=random_weights)
    found = anatomy.document(directory)
    steps = found["steps"]
    assert found["random_weights"] == random_weights and set(steps) == {"generator + critic", "critic", "mean"}
    assert set(steps["critic"]) == PASSED, "nothing is decoded, rewarded or scored where only the critic learns"
    assert set(steps["generator + critic"]) == set(steps["mean"]) == PASSED | {"decode", "reward", "scores"}
    for name, row in steps["mean"].items():  # one of three steps has a turn of the generator
        rare, often = (steps[kind].get(name, {"seconds": 0.0, "tflop": 0.0}) for kind in ("generator + critic", "critic"))
        for key in ("seconds", "tflop"):
            assert row[key] == pytest.approx((rare[key] + 2 * often[key]) / 3)
        assert row["mfu"] == pytest.approx(row["tflop"] / (row["seconds"] * found["recorded"]["peak_tflops"]))
    assert len(records.read_rows(directory / "steps.jsonl", Step)) == 4
    tokens = Tiny().shape.height // CFG.patch[1] * (Tiny().shape.width // CFG.patch[2]) * 6
    least = 2 * sum(flops.dit_pass(CFG, tokens, tokens).values()) / 1e12  # of a batch of two; embeddings and the text's keys come on top
    assert least < steps["critic"]["critic"]["tflop"] < 1.6 * least
    table = anatomy.table(found)
    assert [next(iter(row.values())) for row in table if not next(iter(row.values())).startswith("held: ")] == list(steps["mean"])
    assert anatomy.profile(path, ["accumulate=2"], name="x", repeats=2, random_weights=random_weights) == directory  # what is done is not done again
    switch_off(folders, "merged")
    with pytest.raises(UserError, match=r"settings\.shortcuts\.merged: true -> false"):
        anatomy.profile(path, ["accumulate=2"], name="x", repeats=2, random_weights=random_weights)


def test_what_roles_hold_is_as_planned_but_for_gradients(tmp_path: Path) -> None:
    path = write(tmp_path, "dmd", **EMA | {"ema": {"decay": 0.5}})
    found, planned = anatomy.document(anatomy.profile(path, name="x", repeats=1))["held"], held(recipe(tmp_path, "dmd", **EMA))
    weights = list(Tiny().denoiser.parameters())
    gradients, counts = 4 * sum(weight.numel() for weight in weights), 4 * len(weights)
    for role, called in (("student", "generator"), ("critic", "critic")):
        assert found[called] == planned[role] - gradients + counts
    assert found["teacher"] == planned["teacher"] == gradients


def test_a_mean_weighs_kinds_by_how_often_they_come() -> None:
    steps = [Step("a", {"rollout": 4.0}, {"rollout": 10}), Step("b", {"rollout": 1.0, "critic": 3.0}, {"rollout": 20, "critic": 5})]
    found = summary({"a": {"rollout": 8 * 10**12}, "b": {"critic": 4 * 10**12}}, steps, {"a": (0, 1), "b": (1, 3)}, 2.0)["steps"]
    assert found["a"]["all"] == {"seconds": 4.0, "tflop": 8.0, "peak_bytes": 10, "mfu": 1.0}
    assert found["mean"]["all"] == {"seconds": 4.0, "tflop": 5.0, "peak_bytes": 20, "mfu": 5 / 8}


def test_pairs_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learns from clips or pairs, which can't be drawn"):
        anatomy.profile(write(tmp_path, "ode"), random_weights=True)
