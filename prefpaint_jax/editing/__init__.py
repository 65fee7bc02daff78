"""Image extension and new views, on top of an inpainter."""
