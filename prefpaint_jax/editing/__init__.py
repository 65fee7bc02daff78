"""Image extension and new views with an inpainter."""
