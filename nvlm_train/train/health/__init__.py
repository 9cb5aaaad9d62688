"""Detects trouble in a run and acts on it while nobody watches. The train loop calls `health.py`."""
