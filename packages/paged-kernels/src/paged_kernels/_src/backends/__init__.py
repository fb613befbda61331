"""The backends: what a backend is (`base`), which ones are tried in which order (`table`), and one file for each."""
