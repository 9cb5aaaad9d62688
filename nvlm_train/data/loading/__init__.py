"""Step n of the plan to tensors: samples read, encoded, decoded and collated in the background."""
