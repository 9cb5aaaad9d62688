"""Benchmarks that anyone can rerun. The last line of each one's output is a JSON object with its ratios."""
