"""What `peft-dist status` and `peft-dist logs` show of a run, on Slurm or not."""
