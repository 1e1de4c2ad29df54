"""VBench's protocol and arithmetic: dimensions, prompts, file names, and how rows become dimensions and dimensions become totals.

Plain Python. The networks are those of the PyPI package `vbench`, in an interpreter of their own.
"""
