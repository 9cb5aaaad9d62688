"""Which samples make step n: sources, their blend, packs, and what a stage draws from them."""
