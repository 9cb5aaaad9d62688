"""The demo's material (real text, pages, images, chats) and the small backbones trained on it.

Nothing here is imported by the trainer. `nvlm data prepare` calls `corpus`, `pages`, `captions` and
`chats` to write shards; `python -m nvlm_train.demo.backbones` reproduces the shipped `assets/`.
"""
