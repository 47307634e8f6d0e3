"""Diffraction images to intensities: prediction, shoeboxes, spot models, networks, estimates."""
