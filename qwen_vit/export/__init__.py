"""Bulk export: images to a folder of shards that can be interrupted and resumed."""
