"""What a baseline, a scorer, a suite or a training needs from elsewhere: files of repositories."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rfbench import config, recipes, suites
from rfbench.config import Baseline, External, Recipe, WeightsCfg
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.scorers.base import SCORERS
from rfbench.settings import settings
from rfbench.strict import load_plain
from rfbench.vbench import prompts


@dataclass(frozen=True)
class Item:
    """A file of a Hugging Face repository; or several, by a pattern (`model-*.safetensors`), as a folder of safetensors files, or as all
    that a folder holds (`folder/**`)."""

    repo: str  # <owner>/<name>
    file: str
    revision: str = "main"
    bytes: int | None = None  # of all files together
    sha256: str | None = None  # as `weight_files.sha256_of` gives it
    licence: str = "not stated"
    gated: bool = False  # its authors want to be asked first
    github: bool = False  # a repository there, at the commit `revision`; a single file with its sha256
    branch: str | None = None  # that was found at the commit `revision`

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.file).parts
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) or ".." in (*self.repo.split("/"), *parts) or parts[:1] in ((), ("/",)):
            raise UserError(f"'{self.file}' of '{self.repo}' is not a file of a repository, <owner>/<name>")

    @property
    def several(self) -> bool:
        """Whether it is a pattern or a folder."""
        return "*" in self.file or not PurePosixPath(self.file).suffix

    @property
    def tree(self) -> bool:
        """Whether it is all that a folder holds."""
        return PurePosixPath(self.file).name == "**"

    @property
    def path(self) -> Path:
        """Where it belongs."""
        return settings().weights / self.repo / self.file

    @property
    def host(self) -> str:
        """Who has it."""
        from huggingface_hub import constants

        return prompts.GITHUB if self.github else constants.ENDPOINT

    @property
    def url(self) -> str:
        """Where a single file is."""
        from huggingface_hub import hf_hub_url

        return f"{self.host}/{self.repo}/{self.revision}/{self.file}" if self.github else hf_hub_url(self.repo, self.file, revision=self.revision)


LICENCES = {"Wan-AI/Wan2.1-T2V-1.3B": "apache-2.0", "Wan-AI/Wan2.2-TI2V-5B": "apache-2.0"}  # of what backbones take from there


def items_named(name: str) -> list[Item]:
    """What a scorer, a suite or a baseline of this name needs, or one of a file; VBench is a scorer and a suite.

    Raises:
        UserError: there is nothing of this name, or its file is not valid.
    """
    if name in SCORERS or _is_suite(name):
        if name in SCORERS and name.startswith("vbench"):
            say("the weights of VBench's networks come from where VBench takes them: `rfbench doctor` has the command for each that is missing")
        return [*items_of_scorer(name), *(items_of_suite(name) if _is_suite(name) else [])]
    kind: Any = External if config.is_external(name) else Baseline
    return items_of(config.load(kind, name))


def _is_suite(name: str) -> bool:
    if name in suites.SUITES or name.endswith(".jsonl"):
        return True
    return name.endswith((".yaml", ".yml")) and "prompts" in load_plain(config.find(Baseline, name), (), Baseline)


def items_of(cfg: Baseline | External) -> list[Item]:
    """What a baseline needs: its weights and their adapter, unless they are made or shipped here, and the parts of its backbone."""
    from rfbench.backbones.base import parts_of

    own = cfg.weights
    if isinstance(cfg, External):
        return _items(cfg.license.weights, own, *cfg.parts.values())
    adapter = replace(own, file=own.lora.file, bytes=own.lora.bytes, sha256=own.lora.sha256) if own.lora else None
    parts = parts_of(cfg.backbone, decoder=cfg.decoder)
    return [*_items(cfg.license.weights, own, adapter), *_items(None, *parts.values())]


def items_of_recipe(cfg: Recipe) -> list[Item]:
    """What a training reads that comes from a repository; nobody says under which licence."""
    return _items("not stated", *recipes.files(cfg).values())


def items_of_scorer(name: str) -> list[Item]:
    """What a scorer needs from elsewhere; most need nothing."""
    from rfbench.videoreward.model import FILES, REPOSITORY

    return [Item(REPOSITORY, file) for file in FILES] if name.startswith("videoreward") else []


def items_of_suite(name: str) -> list[Item]:
    """The lists of prompts that a suite takes from elsewhere.

    Raises:
        UserError: no such suite, or a wrong field.
    """
    _, _, header = suites.header_of(suites.split(name)[0])
    wanted = {suites.VBENCH: prompts.FULL_INFO, suites.MOVIEGEN: prompts.MOVIEGEN}.get(header.prompts), prompts.EXTENDED.get(header.extended or "")
    return [Item(one.repo, one.file, one.commit, one.bytes, one.sha256, one.licence, github=True) for one in wanted if one is not None]


def _items(licence: str | None, *wanted: WeightsCfg | None) -> list[Item]:
    """Those of the files that come from a repository; where no licence is given, it is that of the repository."""
    found = [(one, one.repo) for one in wanted if one is not None and one.repo is not None]
    return [Item(repo, one.file, one.revision or "main", one.bytes, one.sha256, licence or LICENCES[repo]) for one, repo in found]
