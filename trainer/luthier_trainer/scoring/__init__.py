"""Figures that compare what a model answers with what it should have answered. Nothing here knows models or tasks."""
