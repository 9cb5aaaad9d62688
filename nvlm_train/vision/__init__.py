"""Floor 3: the frozen vision encoder and how the ranks of a model replica share its work."""
