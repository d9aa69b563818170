"""Find, download, check and convert a model's weights, and copy them to the GPU."""
