"""Find, download, check and convert a model's weights, and move them to the device."""
