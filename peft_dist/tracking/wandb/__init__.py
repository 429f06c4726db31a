"""Weights & Biases: a view of the ledger, sent by a process beside training."""
