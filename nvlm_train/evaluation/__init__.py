"""Floor 5: generates greedily in the model's own layout, and scores answers for the demo."""
