"""GGUF files of llama.cpp to directories as transformers' save_pretrained leaves them.

`file` reads one, `model` finds the model in its metadata, `weights` its tensors, `tokenizer` its
vocabulary, and `directory` writes all of it. Needs the extra `convert` (the library `gguf`).
"""
