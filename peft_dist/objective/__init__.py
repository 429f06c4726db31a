"""What is learned from the rows: losses, passes over preferences, and their reference."""
