"""Development helpers: embedded PostgreSQL clusters and the demo."""
