"""Compare our encoder with Hugging Face's and a float64 oracle, stage by stage."""
