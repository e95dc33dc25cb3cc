"""Joins plan, tensors and text: the step, the loop, and the library's front door. Knows no HTTP."""
