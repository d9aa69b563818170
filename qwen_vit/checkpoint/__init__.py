"""From a model's name to its weights: the Hub, its cache, files, conversion, the GPU."""
