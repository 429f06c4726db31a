"""Where progress is shown. The ledger is the truth; the rest are views of its events."""
