"""Whole vision-language models of others: where each part lies in them, and the projector of NVLM-D."""
