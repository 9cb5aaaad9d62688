"""What runs on one GPU equals what runs on a CPU: gradients, dropout, whole runs, and who waits for whom.

`python -m pytest -m gpu` runs it, with Transformer Engine where it is installed and without. Every run is a
function of a kernel path (paths.py), and the tests without a mark call the same functions on a CPU.
"""
