"""Time vLLM's own tower and ours, and whole requests, inside vLLM on a GPU."""
