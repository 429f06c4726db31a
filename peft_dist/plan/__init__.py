"""What a run will need in bytes and seconds, from a model's config alone and without torch."""
