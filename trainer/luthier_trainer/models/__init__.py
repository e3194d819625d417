"""Models: where they come from, what their files say, heads, merging, and new models from a configuration."""
