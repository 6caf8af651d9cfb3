"""Equalization: where a factor for each channel can be moved from one layer to another, and which factors help."""
