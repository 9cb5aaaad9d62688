"""One file a family of language models: what its config.json may say, and how it differs from the others."""
