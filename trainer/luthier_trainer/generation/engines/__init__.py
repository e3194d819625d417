"""The engines of generation, one file for each kind of model."""
