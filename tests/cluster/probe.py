"""A JobSet that is never created: the API server asks JobSet's webhook about it, so that an answer takes all of it."""

NO_POD = {"spec": {"restartPolicy": "Never", "containers": [{"name": "none", "image": "none"}]}}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": "probe", "namespace": "default"},
    "spec": {"replicatedJobs": [{"name": "none", "template": {"spec": {"template": NO_POD}}}]},
}
CREATE = ("create", "--dry-run=server", "-f", "-")
"""Arguments of kubectl, which reads the JobSet from its stdin."""
