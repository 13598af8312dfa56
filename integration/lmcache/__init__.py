"""VCache under LMCache: its storage plugin and its L2 adapter, and what both are made of."""
