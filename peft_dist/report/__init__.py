"""One self-contained HTML page about runs, made from their directories alone."""
