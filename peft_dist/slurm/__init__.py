"""Hand runs to a Slurm cluster, follow them there, and bring them back."""
