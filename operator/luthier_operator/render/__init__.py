"""Builders of the Kubernetes objects of a job: dictionaries that read like manifests.

Pure, and free of any Kubernetes library. What depends on the kind of a job comes from the `Workload`
that is passed in.
"""
