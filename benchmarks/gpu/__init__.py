"""Training on one GPU beside transformers' InternVL: `python -m benchmarks.gpu`."""
