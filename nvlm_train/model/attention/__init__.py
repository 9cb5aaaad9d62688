"""How tokens read each other and a context, over a whole pack at once: which kernel, and what it needs."""
