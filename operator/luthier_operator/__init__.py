"""The control side: the operator and the `luthier` command. Importing this package imports neither torch nor kopf."""
