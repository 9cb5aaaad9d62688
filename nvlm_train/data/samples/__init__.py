"""A record to tokens: messages, chat format, image slots, labels, and what crosses."""
