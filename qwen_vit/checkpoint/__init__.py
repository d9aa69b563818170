"""Model name -> weights: the Hub, its cache, files, conversion, the GPU."""
