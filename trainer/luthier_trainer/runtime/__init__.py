"""What every process needs: failures and exit codes, the run folder, notices, telemetry, devices."""
