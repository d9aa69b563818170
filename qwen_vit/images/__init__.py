"""Load any kind of image as RGB uint8, and cut it into patches."""
