"""Files and folders of features: how they are written and read."""
