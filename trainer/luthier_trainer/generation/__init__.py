"""The phase `run` of a GenerateJob: samples, their ledger, and the engines that make outputs."""
