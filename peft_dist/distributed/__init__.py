"""Process groups and the few collectives that training needs."""
