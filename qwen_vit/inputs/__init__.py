"""What to export: files, folders, patterns, lists and tars as one ordered list with ids."""
