"""What is measured of a training: steps, memory, utilisation, the final result."""
