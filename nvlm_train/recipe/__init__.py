"""Recipes whose sizes come from weights, and what a directory of weights is. No torch."""
