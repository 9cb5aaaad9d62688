"""Floor 5: greedy generation in the model's own layout, and the scorers of the demo."""
