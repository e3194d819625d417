"""The workspace of a job: manifests, the prepared record, provenance of the inputs, plan and disk space."""
