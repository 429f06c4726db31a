"""The process around a training: signals, watchdog, exit codes."""
