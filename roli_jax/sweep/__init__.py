"""Grids of runs: which there are, and on which machines they run.

Whoever runs a cell imports `engines` alone, which is light.
"""
