"""PID 1 of the pods: checks the run config, starts and stops the processes of a phase, and reports how they ended."""
