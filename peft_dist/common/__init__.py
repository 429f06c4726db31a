"""Plumbing that knows nothing of training: errors, files, paths, durations, processes."""
