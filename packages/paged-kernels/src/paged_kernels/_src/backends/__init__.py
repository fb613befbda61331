"""The backends: what one is (`base`), the ordered lists (`table`), and one file for each."""
