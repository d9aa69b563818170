"""Features, and the encoder itself, in the forms that other software takes."""
