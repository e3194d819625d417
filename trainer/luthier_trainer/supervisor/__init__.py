"""PID 1 of the pods: checks the run config, starts the processes of a phase, stops them, judges how they ended."""
