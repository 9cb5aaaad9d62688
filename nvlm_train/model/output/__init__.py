"""The output layer of the language model: logits, or losses in chunks of the vocabulary."""
