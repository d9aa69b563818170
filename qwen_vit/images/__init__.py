"""Any kind of image -> RGB uint8 -> patches."""
