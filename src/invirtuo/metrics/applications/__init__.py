"""What predictions are used for: hits of a screen, phenotypes, generated cells, embeddings, networks."""
