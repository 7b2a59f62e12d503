"""Experiments: runs, their training, tables of results and figures."""
