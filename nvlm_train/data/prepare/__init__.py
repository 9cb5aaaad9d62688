"""Raw files to shards: `nvlm data prepare`, in parallel, and again from where it was killed."""
