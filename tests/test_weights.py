"""Checkpoints that are whole come back as they were; all others are refused with one sentence, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rfbench.config import WeightsCfg
from rfbench.errors import UserError
from rfbench.records import sha256_of
from rfbench.weights import Ema, load_into, read_tensors, resolve, save


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    return dict(model(seed).state_dict())


def read(path: Path, **fields: Any) -> dict[str, Tensor]:
    return read_tensors(path, WeightsCfg(file=path.name, **fields))


def refused(path: Path, **fields: Any) -> str:
    """The one sentence with which a file is refused, from reading it or from putting it into a model."""
    with pytest.raises(UserError) as raised:
        load_into(model(1), read(path, **fields), where=path)
    sentence = str(raised.value)
    assert str(path) in sentence and "\n" not in sentence and len(sentence) < 400
    return sentence


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, ending: str) -> None:
    path, source, copy = tmp_path / f"x{ending}", model(0), model(1)
    if ending == ".safetensors":
        save(path, source, {"recipe": "a test"})
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"about": '{"recipe":"a test"}'}
    else:
        torch.save(source.state_dict(), path)
    load_into(copy, read(path), where=path)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), copy.state_dict().values(), strict=True))


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for number in range(20):
        save(tmp_path / f"{number}.safetensors", model(0), {"seed": "0", "recipe": "r", "fingerprint": "f"})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{number}.safetensors" for number in range(20))


def test_an_entry_is_opened_and_a_prefix_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pt"
    torch.save({"step": 3, "generator_ema": {f"model.{name}": tensor for name, tensor in tensors().items()}}, path)
    found = read(path, key="generator_ema", strip="model.")
    assert found.keys() == tensors().keys()
    assert "has no entry 'generator'; it has generator_ema, step" in refused(path, key="generator")
    assert "does not start with 'net.'" in refused(path, key="generator_ema", strip="net.")
    assert "lacks" in refused(path, key="generator_ema")
    assert "does not hold tensors by name under 'step'" in refused(path, key="step")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_broken_file_is_not_read(tmp_path: Path, ending: str) -> None:
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    if ending == ".pt":
        torch.save(tensors(), whole)
    else:
        save(whole, model(), {})
    content = whole.read_bytes()
    for broken in (b"", b"\0", content[: len(content) // 2], content[:-1], b"x" * 1000, bytes(1000), content[:40], b"\xff" * 8 + content[8:]):
        path.write_bytes(broken)
        assert "not a readable checkpoint" in refused(path)
    path.unlink()
    path.mkdir()
    assert "not a readable checkpoint" in refused(path)


class Payload:
    """Pickles to a call that makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("inside", ["zip", "pickle", "beside tensors", "legacy"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, inside: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    payload: Any = {**tensors(), "extra": Payload(trace)} if inside == "beside tensors" else Payload(trace)
    if inside == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=inside != "legacy")
    assert "not a readable checkpoint" in refused(path)
    assert not trace.exists()
    if inside == "pickle":
        pickle.loads(path.read_bytes())  # the payload works where nobody is careful
        assert trace.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {0: torch.zeros(3)}, "text", None])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert "does not hold tensors by name" in refused(path)
    torch.save({**tensors(), "0.bias": content}, path)
    assert "0.bias" in refused(path)


def test_names_shapes_and_values_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def refused_with(**changes: Tensor | None) -> str:
        found = {name: tensor for name, tensor in (tensors() | changes).items() if tensor is not None}
        save_file(found, path)
        return refused(path)

    nan, infinite = torch.zeros(4), torch.zeros(4)
    nan[2], infinite[0] = float("nan"), float("inf")
    assert "lacks 2 tensor(s), first '0.bias'" in refused_with(**{"0.bias": None, "1.weight": None})
    assert "has unknown 1 tensor(s), first 'head.bias'" in refused_with(**{"head.bias": torch.zeros(2)})
    assert "has another shape of 1 tensor(s), first '0.weight'" in refused_with(**{"0.weight": torch.zeros(4, 4)})
    assert "has NaN or infinity in 1 tensor(s), first '0.bias'" in refused_with(**{"0.bias": nan})
    assert "has NaN or infinity in 1 tensor(s), first '0.bias'" in refused_with(**{"0.bias": infinite})


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    target = model(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError):
        load_into(target, tensors() | {"1.bias": torch.full((2,), float("nan"))}, where=tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_half_precision_is_converted_and_checked(tmp_path: Path) -> None:
    target = model(1)
    load_into(target, {name: tensor.bfloat16() for name, tensor in tensors().items()}, where=tmp_path)
    for name, tensor in target.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors()[name].bfloat16().float())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, model(0), {})
    before = path.read_bytes()

    class Broken(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left") as raised:
        save(path, Broken(), {})
    assert raised.value.code == 1
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_are_looked_up_beside_the_yaml_then_among_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "rfbench.toml"
    settings.write_text("[paths]\nweights = 'store'\nruns = 'done'\n")
    monkeypatch.setenv("RFBENCH_TOML", str(settings))
    yaml = tmp_path / "recipes" / "x.yaml"
    beside, stored = yaml.parent / "w.safetensors", tmp_path / "store" / "w.safetensors"
    with pytest.raises(UserError, match=r"weights 'w.safetensors', named by x.yaml, are neither beside that file nor in"):
        resolve(WeightsCfg("w.safetensors"), yaml)
    for path in (stored, beside):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.parent.name.encode())
        assert resolve(WeightsCfg("w.safetensors"), yaml) == path
    assert resolve(WeightsCfg("w.safetensors", sha256=sha256_of(beside)), yaml) == beside
    with pytest.raises(UserError, match=r"has sha256 .* but x.yaml asks for 000000000000"):
        resolve(WeightsCfg("w.safetensors", sha256="0" * 64), yaml)
    with pytest.raises(UserError, match="training run 'toy/teacher' has not finished"):
        resolve(WeightsCfg("run:toy/teacher"), yaml)
    trained = tmp_path / "done" / "train" / "toy" / "teacher" / "weights.safetensors"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"")
    assert resolve(WeightsCfg("run:toy/teacher"), yaml) == trained


def test_the_average_is_the_sum_of_decayed_values() -> None:
    decay, values = 0.7, [2.0, -1.0, 5.0, 0.5]
    parameter = nn.Parameter(torch.tensor([values[0]]))
    average = Ema([parameter], decay)
    for value in values[1:]:
        parameter.data.fill_(value)
        average.update([parameter])
    count = len(values) - 1
    wanted = decay**count * values[0] + sum((1 - decay) * decay ** (count - i) * values[i] for i in range(1, count + 1))
    assert float(average.average[0]) == pytest.approx(wanted, rel=1e-6)
    assert parameter.item() == values[-1]
    average.copy_to([parameter])
    assert parameter.item() == pytest.approx(wanted, rel=1e-6)
