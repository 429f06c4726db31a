"""Check the nodes of a job before training starts on them."""
