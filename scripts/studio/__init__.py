"""One local page for runs, data and talk, and an endpoint: python -m scripts.studio."""
