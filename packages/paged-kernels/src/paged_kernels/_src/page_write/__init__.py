"""Writing new keys and values into pages: the call (`api`), and one folder per kernel."""
