"""What a recipe may say, and how one is read. No torch, no file system beyond the recipe."""

from peft_dist.config.load import load_recipe, render_recipe
from peft_dist.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "render_recipe"]
