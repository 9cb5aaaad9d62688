"""What is reported about a run: metrics.jsonl, the terminal, wandb, and answers to a few samples."""
