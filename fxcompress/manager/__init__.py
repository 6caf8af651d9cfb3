"""Running pipelines: the pass manager, what watches it, and what it notes."""
