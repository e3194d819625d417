"""The phase `publish`: merges, uploads and verifies results, and writes the model card."""
