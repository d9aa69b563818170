"""Towers and requests inside vLLM on a GPU: its own, as it comes and at its best, and ours."""
