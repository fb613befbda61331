"""Attention over a layer's pages: `attend` writes and attends, `prepare` does once a step what all layers share."""
