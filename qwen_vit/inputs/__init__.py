"""Files, folders, patterns, lists and tars as one ordered list of images with ids."""
