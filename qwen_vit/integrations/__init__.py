"""Features, and the encoder itself, in the forms of other software."""
