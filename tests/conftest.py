"""What every test gets: one thread, folders of its own, and no GPU test without a GPU."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, and who has used threads must not fork

if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when they are defined

import hypothesis
import pytest

hypothesis.settings.register_profile("rfbench", deadline=None)  # a busy machine is no reason to fail
hypothesis.settings.load_profile("rfbench")


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    """Runs, weights and reports of a test lie in a folder of its own, never in the checkout; returns that folder."""
    folder = tmp_path_factory.mktemp("rfbench")
    (folder / "rfbench.toml").write_text("[hardware.cpu]\ntitle = 'CPU'\nmatch = 'cpu'\n")
    monkeypatch.setenv("RFBENCH_TOML", str(folder / "rfbench.toml"))
    return folder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Runs of a study with one contender missing and one hostile prompt, its report and its records: made once, so nobody changes them."""
    from rfbench import report
    from tests.test_report import HOSTILE, PROMPTS, write_runs

    root = tmp_path_factory.mktemp("study")
    write_runs(root, [*PROMPTS, HOSTILE])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("RFBENCH_TOML", raising=False)
        report.report([], study="study.yaml", out=root / "reports" / "study", record=True)
    return root


def pytest_collection_modifyitems(items):
    if not os.environ.get("RFBENCH_SLOW"):
        skip(items, "slow", "takes minutes; set RFBENCH_SLOW=1 to run it")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip(items, "gpu", "there is no CUDA device")


def skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
