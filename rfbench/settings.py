"""The settings of this machine, from rfbench.toml: where things are, what devices are called and how networks run, never what a thing is."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rfbench.errors import UserError
from rfbench.strict import build

HOME = Path(__file__).resolve().parent.parent  # the checkout: recipes/ and baselines/ lie beside the package


@dataclass(frozen=True)
class Hardware:
    """A device, what its maker prints as the dense peak of its matrix units (TFLOP/s by dtype), and how much memory its driver reports."""

    title: str
    match: str  # part of the device's name as torch tells it
    tflops: dict[str, float] = field(default_factory=dict)
    memory_gib: float | None = None


@dataclass(frozen=True)
class PathsCfg:
    runs: str = "runs"
    weights: str = "weights"
    reports: str = "reports"
    envs: str = "envs"
    mirror: str | None = None  # where fsspec can write; see `rfbench.mirror`


@dataclass(frozen=True)
class JudgeCfg:
    """The vision-language model that scorer `judge` asks; the key of its server is in the environment, RFBENCH_JUDGE_KEY."""

    model: str = ""  # as the server calls it; without a server a folder that transformers can load, or its name in the weights directory
    server: str | None = None  # base address of an OpenAI-compatible server
    parallel: int = 4  # clips that a server is asked about at a time
    timeout: float = 300.0  # seconds
    price_in: float = 0.0  # of a million tokens, in whatever currency
    price_out: float = 0.0


@dataclass(frozen=True)
class Shortcuts:
    """Work of a pass that is left out or joined, each part for itself. The video stays the same up to rounding (`rfbench.rungs`).

    What is asked for must be possible (`rfbench.backbones.wan.lean.taken`); None is where it is possible. Kernels and graphs, which have
    not run on a GPU yet, only on a CPU by an interpreter and a stand-in, also have to prove themselves there (`rfbench.proof`).
    """

    modulation: bool = True  # what depends on the timestep alone is computed once per stream and not in every pass
    context: bool = True  # the clean pass ends at the keys and values of the last layer
    merged: bool = True  # queries, keys and values are one product; queries and keys are normalised and rotated together
    fused: bool = True  # modulation is part of its layer norm, the gate of its residual sum; other norms take fewer operations
    columns: bool | None = None  # on a CPU, small weights are copied column by column: a product of few rows reads them faster
    sigmoid: bool | None = None  # on a CPU, GELU is taken by a sigmoid, which is faster there than a tangent
    untracked: bool = True  # tensors keep no record of views and versions, which only gradients need
    kernels: bool | None = None  # on a GPU, Triton: what lies between two products, or two convolutions of a decoder, is one reading and writing
    graphs: bool | None = None  # on a GPU, passes are recorded once and replayed, from the second stream of a `LeanDiT` on without any recording
    joint: bool = True  # the clean pass of a chunk goes along with the first step of the next one
    bytes: bool | None = None  # on a GPU, frames become bytes before they go to the host
    copies: bool | None = None  # on a GPU, frames go to the host by page-locked memory, beside what the device does next


@dataclass(frozen=True)
class FastCfg:
    """How networks run on this machine. No video depends on it but for rounding: a run records it, and is identified by it only if it is timed."""

    attention: Literal["auto", "fa3", "cudnn", "fa2", "torch-sdpa", "math"] = "auto"  # see `rfbench.attention.choose`
    shortcuts: Shortcuts = Shortcuts()
    tokens: int = (
        600  # of a pass of `generate`, its clips together: on a CPU 16 toy clips take a third of the time of 16 single ones, more gain nothing
    )


@dataclass(frozen=True)
class SettingsFile:
    """What rfbench.toml says."""

    paths: PathsCfg = PathsCfg()
    judge: JudgeCfg = JudgeCfg()
    fast: FastCfg = FastCfg()
    hardware: dict[str, Hardware] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What rfbench.toml says, with its paths made absolute."""

    runs: Path  # what train, generate, eval and profile write
    weights: Path  # weights that are too large to ship
    reports: Path
    envs: Path  # interpreters of their own, that `rfbench env` builds
    mirror: str | None  # where runs have a copy
    judge: JudgeCfg
    fast: FastCfg
    hardware: dict[str, Hardware]

    def hardware_name(self, device: str) -> str:
        """What a device is called here: the table that matches its name ("NVIDIA H200" is h200), else the name in path letters."""
        for name, table in self.hardware.items():
            if table.match.lower() in device.lower():
                return name
        return "-".join("".join(letter if letter.isalnum() else " " for letter in device.lower()).split())


def settings_file() -> Path | None:
    """The rfbench.toml in force: the one that RFBENCH_TOML names, else of the current directory, else of the checkout.

    Raises:
        UserError: RFBENCH_TOML names a file that is not there.
    """
    named = os.environ.get("RFBENCH_TOML")
    if named:
        if not Path(named).is_file():
            raise UserError(f"RFBENCH_TOML is {named}, but there is no such file; set it to an rfbench.toml or unset it")
        return Path(named).resolve()
    for folder in (Path.cwd(), HOME):
        if (folder / "rfbench.toml").is_file():
            return folder / "rfbench.toml"
    return None


def settings() -> Settings:
    """The settings of this machine; relative paths start at rfbench.toml, or at the current directory if there is none.

    Raises:
        UserError: not TOML, an unknown key, a wrong type, or a place that is no file system.
    """
    path = settings_file()
    found = SettingsFile()
    if path is not None:
        try:
            found = build(SettingsFile, tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML ({error})") from None
    home = path.parent if path else Path.cwd()
    paths = found.paths
    for name, folder in vars(paths).items():
        if name != "mirror" and "://" in folder:  # runs live by locks and renames, which object stores do not have
            raise UserError(f"{path}: '{name}' is {folder}, and an object store cannot hold it; name a disk, and the store as 'mirror'")
    if paths.mirror is not None and "://" not in paths.mirror:
        raise UserError(f"{path}: 'mirror' is {paths.mirror}; write an address such as s3://bucket/runs or file:///shared/runs")
    runs, weights, reports, envs = (home / Path(folder).expanduser() for folder in (paths.runs, paths.weights, paths.reports, paths.envs))
    return Settings(runs, weights, reports, envs, paths.mirror, found.judge, found.fast, found.hardware)
