"""The wrappers: one base, and a small module for each technique."""
