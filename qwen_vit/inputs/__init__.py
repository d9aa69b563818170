"""List the images of files, folders, patterns, lists and tars in one order, with ids."""
