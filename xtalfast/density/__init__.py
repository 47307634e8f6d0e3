"""From structures to training examples: fragments in tight P1 cells, their maps, batches made on the fly."""
