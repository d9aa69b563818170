"""Draw dense features: feature maps, similarity maps and window layouts."""
