"""Datasets: reading files and the Hub, columns, labels, tokens, packing."""
