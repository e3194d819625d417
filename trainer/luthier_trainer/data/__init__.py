"""Datasets: rows of files and of the Hub, columns, labels, tokens, and packing."""
