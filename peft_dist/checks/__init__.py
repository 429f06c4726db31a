"""What of one machine would end a run or slow it: `doctor` and the pre-flight ask the same.

Without torch. What only several nodes can find out, or a recipe, is left to those two.
"""
