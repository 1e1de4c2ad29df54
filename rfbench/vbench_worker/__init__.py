"""The program that runs VBench's networks, inside the interpreter that holds the PyPI package `vbench` and not beside ours.

`python -m rfbench.vbench_worker JOB.json` answers every item of a job with one JSON line; `--check` says which dimensions can run.
It imports the standard library, torch, numpy, what vbench brings, and `rfbench.records` with what that needs: nothing else of ours.
"""

REVISION = 2  # of the drivers: goes up whenever a score could change
