"""The demo's small pretrained backbones, and how they were trained."""
