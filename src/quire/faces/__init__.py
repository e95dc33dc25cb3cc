"""Thin public faces on the one engine: tensors, slots, pages, and the shapes that other libraries call."""
