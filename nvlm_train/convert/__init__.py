"""What others made, against the recipe: weights, their config.json, and the tokenizer.

A checkpoint of another model has the same file names and mostly the same tensors, and computes
something else. So every tensor and every key that changes the computation is accounted for, from
headers and JSON only, before memory is taken:

    problem    what is found, with its remedy
    keys       kinds of rules on one key of a config.json
    family     a model as tables of data, and the check of a directory against it
    headers    names, shapes and dtypes of safetensors files
    weight_files  slices of their tensors, counted, and no more of them in memory than is kept
    rope       rotary position parameters as transformers 4 and 5 write them
    ignored    keys that change nothing
    language   the table of language models (a later family is a file in families/ and a row), and their check
    vision     the table of vision encoders (a layout is a file in encoders/), and their check
    whole/     a part inside a whole vision-language model, and the projector of NVLM-D
    names      Hugging Face's names of a language model's tensors against global ones
    reader     weights into any layout, one tensor at a time
    tokenizer  control tokens, tile tags, ids and the embedding table
    check      all of it for a recipe: `nvlm doctor` reports it, training refuses it
"""
