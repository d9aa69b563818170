"""From anything called an image to RGB uint8, and to patches."""
