"""Pipelines as text: how passes and their options are written, read and checked."""
