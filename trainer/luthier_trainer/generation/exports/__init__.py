"""The forms in which outputs are delivered, a file each."""
