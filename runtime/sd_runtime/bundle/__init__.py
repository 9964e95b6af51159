"""A bundle on disk: where it lies, what it says of itself, and its files, verified."""
