"""What is fast: the tower, exports, loading and the CPU; rows go to ledger.jsonl."""
