"""Trains the demo's small pretrained backbones."""
