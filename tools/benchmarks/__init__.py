"""Measure the speed of the tower, exports, loading and the CPU; ledger.jsonl has the rows."""
