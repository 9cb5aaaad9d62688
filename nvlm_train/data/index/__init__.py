"""What is in a shard: where its samples lie, how large their images are, how long they are encoded."""
