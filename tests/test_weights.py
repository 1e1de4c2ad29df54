"""Checkpoints that are whole come back as they were; all others are refused with one sentence, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rfbench import records, weight_files
from rfbench.config import WeightsCfg
from rfbench.errors import UserError
from rfbench.records import sha256_of
from rfbench.weight_files import identity, resolve
from rfbench.weights import Ema, load_into, read_tensors, save


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    return dict(model(seed).state_dict())


def read(path: Path, **fields: Any) -> Mapping[str, Tensor]:
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
        save(path, source.state_dict(), {"recipe": "a test"})
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"about": '{"recipe":"a test"}'}
    else:
        torch.save(source.state_dict(), path)
    load_into(copy, read(path), where=path)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), copy.state_dict().values(), strict=True))


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for number in range(20):
        save(tmp_path / f"{number}.safetensors", model(0).state_dict(), {"seed": "0", "recipe": "r", "fingerprint": "f"})
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


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(1), "_orig_mod.0.weight": torch.ones(1)}, tmp_path / "x.pt")
    assert "holds '0.weight' twice, the second time as '_orig_mod.0.weight' of x.pt" in refused(tmp_path / "x.pt")


def shards(folder: Path, *, index: bool = True) -> list[Path]:
    """The model's four tensors in three numbered files."""
    folder.mkdir(parents=True)
    names = sorted(tensors())
    parts = {f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors": names[number : 4 if number == 2 else number + 1] for number in range(3)}
    for file, part in parts.items():
        save_file({name: tensors()[name] for name in part}, folder / file)
    if index:
        where = {name: file for file, part in parts.items() for name in part}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return [folder / file for file in parts]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "given", ["", "transformer", "diffusion_pytorch_model-*.safetensors", "transformer/diffusion_pytorch_model*-of-00003.safetensors"]
)
def test_shards_are_one_checkpoint_and_all_have_to_be_there(tmp_path: Path, given: str, index: bool) -> None:
    folder = tmp_path / "transformer" if "transformer" in given or not given else tmp_path / "flat"
    files = shards(folder, index=index)
    path = (tmp_path if "transformer" in given or not given else folder) / given
    target = model(1)
    load_into(target, read(path), where=path)
    assert all(torch.equal(tensor, tensors()[name]) for name, tensor in target.state_dict().items())
    files[1].unlink()
    with pytest.raises(UserError, match=f"lacks 1 of the 3 files of its checkpoint, first '{files[1].name}'; fetch it again"):
        read(path)


def test_a_shard_that_only_the_index_knows_is_missed(tmp_path: Path) -> None:
    shards(tmp_path / "x")
    index = tmp_path / "x" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "more.safetensors"}}))
    with pytest.raises(UserError, match=r"first 'more\.safetensors'"):
        read(tmp_path / "x")
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', "{"):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is not"):
            read(tmp_path / "x")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_broken_file_is_not_read(tmp_path: Path, ending: str) -> None:
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    if ending == ".pt":
        torch.save(tensors(), whole)
    else:
        save(whole, model().state_dict(), {})
    content = whole.read_bytes()
    for broken in (b"", b"\0", content[: len(content) // 2], content[:-1], b"x" * 1000, bytes(1000), content[:40], b"\xff" * 8 + content[8:]):
        path.write_bytes(broken)
        assert "not a readable checkpoint" in refused(path)
    path.unlink()
    path.mkdir()
    assert "not a readable checkpoint (it has no *.safetensors)" in refused(path)


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
    for dtype in (torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn):
        kind = str(dtype).removeprefix("torch.")
        assert f"has another kind of number in 1 tensor(s), first '0.bias ({kind})'" in refused_with(**{"0.bias": torch.ones(4).to(dtype)})


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_meta_takes_the_tensors_over(tmp_path: Path, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        target = model(1).to(dtype)
    next(target.children()).requires_grad_(False)
    source = tensors()
    load_into(target, source, where=tmp_path)
    for name, tensor in target.state_dict().items():
        assert not tensor.is_meta and torch.equal(tensor, source[name].to(dtype))
        assert (tensor.data_ptr() == source[name].data_ptr()) == (dtype == torch.float32)
    assert [parameter.requires_grad for parameter in target.parameters()] == [False, False, True, True]


def test_a_model_with_memory_of_its_own_shares_none_with_the_checkpoint(tmp_path: Path) -> None:
    source, target = tensors(), model(1)
    load_into(target, source, where=tmp_path)
    assert all(torch.equal(tensor, source[name]) and tensor.data_ptr() != source[name].data_ptr() for name, tensor in target.state_dict().items())


def test_nothing_is_left_on_meta(tmp_path: Path) -> None:
    with torch.device("meta"):
        target = model(1)
        target.register_buffer("table", torch.arange(3), persistent=False)
    with pytest.raises(ValueError, match="no checkpoint fills table"):
        load_into(target, tensors(), where=tmp_path)
    torch.save(dict(target.state_dict()), tmp_path / "meta.pt")
    assert "has something else for 4 tensor(s)" in refused(tmp_path / "meta.pt")


LOADS = """
import sys
from pathlib import Path
import torch
from rfbench.config import WeightsCfg
from rfbench.weights import load_into, read_tensors

def memory(kind):
    return 1024 * int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0])

width = int(sys.argv[1])
for path in map(Path, sys.argv[2:]):
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(8)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    cfg = WeightsCfg(path.name, key="generator" if path.suffix == ".pt" else None)
    load_into(model, read_tensors(path, cfg), where=path)
    assert all(bool((layer.weight == 1.5).all()) for layer in model)
    print(memory("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is told by Linux alone")
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    width = 2048
    content = {f"{layer}.weight": torch.full((width, width), 1.5) for layer in range(8)}
    paths = [tmp_path / kind for kind in ("x.pt", "x.safetensors", "shards")]
    torch.save({"critic": {name: tensor + 1 for name, tensor in content.items()}, "generator": content}, paths[0])
    save_file(content, paths[1])
    paths[2].mkdir()
    for number in range(4):
        part = dict(list(content.items())[2 * number : 2 * number + 2])
        save_file(part, paths[2] / f"model-{number + 1:05}-of-00004.safetensors")
    done = subprocess.run([sys.executable, "-c", LOADS, str(width), *paths], check=True, capture_output=True, text=True)
    for path, line in zip(paths, done.stdout.split(), strict=True):
        share = int(line) / (8 * width * width * 4)
        print(f"{path.name}: at its peak, loading took {share:.2f} of the model's 128 MiB")
        assert 0.9 < share < 1.3


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, model(0).state_dict(), {})
    before = path.read_bytes()

    class Broken(dict[str, Tensor]):
        def items(self) -> Any:
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


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rfbench.toml").write_text("[paths]\nweights = 'store'\n")
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    return tmp_path / "store"


def test_every_repository_has_a_folder_of_its_own(store: Path, tmp_path: Path) -> None:
    """File names such as model.pt are the same in many."""
    cfg = WeightsCfg("checkpoints/model.pt", repo="someone/Thing", revision="abc")
    with pytest.raises(
        UserError, match=r"nor in .*store/someone/Thing; `rfbench fetch` brings it from https://huggingface.co/someone/Thing/tree/abc"
    ):
        resolve(cfg, tmp_path / "x.yaml")
    file = store / "someone" / "Thing" / "checkpoints" / "model.pt"
    file.parent.mkdir(parents=True)
    torch.save(tensors(), file)
    assert resolve(cfg, tmp_path / "x.yaml") == file
    size = file.stat().st_size
    assert resolve(WeightsCfg(cfg.file, cfg.repo, bytes=size), tmp_path / "x.yaml") == file
    with pytest.raises(UserError, match=rf"has {size} bytes, but x.yaml asks for {size + 1}: its download broke off; fetch it again"):
        resolve(WeightsCfg(cfg.file, cfg.repo, bytes=size + 1), tmp_path / "x.yaml")
    with pytest.raises(UserError, match="it is another file"):
        resolve(WeightsCfg(cfg.file, cfg.repo, bytes=size - 1), tmp_path / "x.yaml")


def test_shards_are_found_by_pattern_and_identified_together(store: Path, tmp_path: Path) -> None:
    files = shards(store / "a" / "b")
    cfg = WeightsCfg("diffusion_pytorch_model-*.safetensors", repo="a/b", bytes=sum(file.stat().st_size for file in files))
    path = resolve(cfg, tmp_path / "x.yaml")
    first = identity(path, cfg)
    assert resolve(WeightsCfg(cfg.file, repo="a/b", sha256=first), tmp_path / "x.yaml") == path
    save_file({name: tensor + 1 for name, tensor in read(files[0]).items()}, files[0])
    assert identity(path, cfg) != first
    with pytest.raises(UserError, match="was altered or its download broke"):
        resolve(WeightsCfg(cfg.file, repo="a/b", sha256=first), tmp_path / "x.yaml")
    assert identity(files[0], WeightsCfg(files[0].name)) == sha256_of(files[0])


def test_a_large_file_is_hashed_once_until_it_changes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_files: list[Path] = []

    def counting(path: Path) -> str:
        read_files.append(path)
        return sha256_of(path)

    monkeypatch.setattr(records, "sha256_of", counting)
    path, other = tmp_path / "large", tmp_path / "small"
    path.write_bytes(b"a" * 100)
    other.write_bytes(b"b" * 99)
    monkeypatch.setattr(weight_files, "LARGE", 100)
    for _ in range(3):
        assert weight_files.sha256_of([path]) == sha256_of(path) and weight_files.sha256_of([other]) == sha256_of(other)
    assert read_files == [path, other, other, other]
    os.utime(path, ns=(0, 1))
    assert weight_files.sha256_of([path]) == sha256_of(path) and read_files[4:] == [path]
    path.write_bytes(b"a" * 101)
    os.utime(path, ns=(0, 1))
    assert weight_files.sha256_of([path]) == sha256_of(path) and read_files[5:] == [path]
    for damage in ("{", "[]", '{"x": 1}', ""):
        (store / ".sha256.json").write_text(damage)
        assert weight_files.sha256_of([path]) == sha256_of(path)
    assert len(read_files) == 10 and [file.name for file in store.iterdir()] == [".sha256.json"]


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
