"""Names of the environment variables that this program sets and reads."""

STORE_SECRET = "PEFT_DIST_STORE_SECRET"
"""What the processes of one start know, and nobody else."""
ROUND = "PEFT_DIST_ROUND"
"""How often the processes of this start were started, from 1."""
