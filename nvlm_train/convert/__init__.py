"""Floor 5: Hugging Face weights in and out, from one table read in both directions."""
