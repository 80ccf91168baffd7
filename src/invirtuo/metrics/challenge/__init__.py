"""Scores as the Virtual Cell Challenges give them: metrics of all perturbations, anchors, and scores between these."""
