"""Check correctness with parity, thousands of random cases, long trials, and a sanitizer."""
