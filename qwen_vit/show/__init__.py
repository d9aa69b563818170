"""Pictures of dense features: feature maps, similarity maps, window layouts."""
