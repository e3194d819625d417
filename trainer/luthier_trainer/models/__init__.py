"""Models: sources, checks of their files, heads, merging of adapters, and new models from a configuration."""
