"""The tasks of a FineTuneJob, one file each."""
