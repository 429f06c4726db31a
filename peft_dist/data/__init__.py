"""From the user's rows to the batches of one rank: read, tokenise once, order, pack.

Nothing here knows about models, processes or devices beyond moving a batch to one.
"""
