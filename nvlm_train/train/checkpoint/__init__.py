"""Checkpoints: saved, published, verified, and loaded in any layout."""
