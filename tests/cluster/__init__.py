"""Where the tests get a Kubernetes from, and the tests that need one (`cluster.py` is the command)."""
