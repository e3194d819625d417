"""The phase `run` of a FineTuneJob: training that survives stops and failures."""
