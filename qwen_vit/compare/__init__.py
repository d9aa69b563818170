"""Compare our encoder with Hugging Face's encoder and a float64 oracle, stage by stage."""
