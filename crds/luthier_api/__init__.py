"""The API of Luthier: what users write, what the operator reports, and what the two sides of it hand each other.

Pure types: neither Kubernetes nor torch is imported here, so that the operator, the pods and the command line can all
share them.
"""

GROUP = "luthier.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
