"""What metrics compute with: passes over files of cells, principal axes, distances, ranks; no files, no conditions."""
