"""`make demo`: one process computes a prompt's KV, another goes on from it, and both give the same tokens."""
