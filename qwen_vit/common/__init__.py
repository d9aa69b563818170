"""Provide small helpers that do not depend on images or models."""
