"""How processes start: where they run, the command that starts them, and running it here."""
