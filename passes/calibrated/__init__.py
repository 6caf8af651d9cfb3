"""Fitting layers to calibration batches: values of two Programs side by side, what filters see, and least squares."""
