"""What is right: parity, thousands of random cases, long trials, and a sanitizer."""
