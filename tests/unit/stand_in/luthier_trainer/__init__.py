"""Stands where the trainer stands, so that `luthier run` is tested in seconds: a supervisor that does what a script
says.
"""
