"""Engines that run the result, and the files that they read."""
