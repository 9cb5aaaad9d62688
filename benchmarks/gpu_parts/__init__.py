"""The parts of a step in the ways there are to compute them: `python -m benchmarks.gpu_parts`."""
