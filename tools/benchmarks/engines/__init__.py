"""Time vLLM's own tower, our tower and whole requests inside vLLM on a GPU."""
