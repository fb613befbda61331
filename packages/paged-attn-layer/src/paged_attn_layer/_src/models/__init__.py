"""Models: what the engine asks of one (`causal_lm`), a decoder, and a file for each family (`registry`)."""
