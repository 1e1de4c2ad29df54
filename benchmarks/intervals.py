"""How often nominal 95 % intervals hold the truth: percentile and BCa bootstrap against `rfbench.statistics`.

    python benchmarks/intervals.py [TABLES]

Prints the table in the docstring of `rfbench.statistics`: simulated prompts are normal with a standard deviation of 1, a
training seed adds `seed sd` times a normal number to all of them, and each pair has noise of 0.5 of its own.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy import stats

from rfbench.statistics import Array, mean, sample

DRAWS = 1000
SETTINGS = ((1, 6, 0.0), (1, 12, 0.0), (1, 30, 0.0), (2, 12, 0.3), (2, 12, 1.0), (3, 30, 1.0))


def bootstrap(y_SP: Array, rng: np.random.Generator) -> Array:
    """Means over resampled prompts and seeds: [DRAWS]."""
    seeds, prompts = y_SP.shape
    drawn_P = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS) / prompts
    drawn_S = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    return np.asarray(((drawn_S @ y_SP) * drawn_P).sum(1))


def bca(y_SP: Array, draws: Array) -> tuple[float, float]:
    """Bias-corrected and accelerated ends; the acceleration from leaving out one prompt at a time (Efron 1987)."""
    by_prompt = y_SP.mean(0)
    spread = (by_prompt - by_prompt.mean()) / (len(by_prompt) - 1)
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bias = stats.norm.ppf(np.clip((draws < y_SP.mean()).mean(), 1e-6, 1 - 1e-6))
    z = bias + stats.norm.ppf([0.025, 0.975])
    low, high = np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def main(tables: int) -> None:
    rng = np.random.default_rng(0)
    print("seeds  prompts  seed sd   percentile      BCa   stretched")
    for seeds, prompts, seed_sd in SETTINGS:
        covered = np.zeros(3)
        for _ in range(tables):
            y_SP = rng.normal(size=(1, prompts)) + seed_sd * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(seeds, prompts))
            draws = bootstrap(y_SP, rng)
            ours = mean(sample(y_SP.ravel(), list(range(prompts)) * seeds, np.repeat(np.arange(seeds), prompts).tolist()))
            assert ours.low is not None and ours.high is not None
            ends = (*np.quantile(draws, [0.025, 0.975]), *bca(y_SP, draws), ours.low, ours.high)
            covered += [ends[i] <= 0 <= ends[i + 1] for i in (0, 2, 4)]
        shares = "".join(f"{share:10.0%}" for share in covered / tables)
        print(f"{seeds:5d}{prompts:9d}{seed_sd:9.1f}  {shares}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1500)
