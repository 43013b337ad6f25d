"""Recipes as YAML files, the command that runs one, and the demo."""
