"""The ledger of a run: one JSON line per event, its writer, and what is computed from it."""
