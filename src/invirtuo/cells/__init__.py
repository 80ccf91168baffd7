"""Everything between a file and a Batch: reading, checking, choosing genes, joining, and drawing cells for training."""
