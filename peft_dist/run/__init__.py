"""One run on disk: its directory, its lease, its history of attempts."""
