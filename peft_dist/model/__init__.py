"""The frozen base: its architecture, its bytes, where they come from, and what a pass computes."""
