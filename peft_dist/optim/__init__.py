"""The optimizer of the adapter and its learning rate."""
