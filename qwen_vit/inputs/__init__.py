"""List the images of files, folders, patterns, lists, tars and Parquet files, and read them."""
