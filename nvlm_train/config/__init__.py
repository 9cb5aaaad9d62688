"""Floor 0: the recipe's schema, its loading by Hydra, and its rules. Imports neither torch nor megatron."""
