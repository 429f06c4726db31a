"""A run on fake tensors: the product's own start and steps, of one rank of many, without memory."""
