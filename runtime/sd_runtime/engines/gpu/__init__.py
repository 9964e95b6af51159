"""One GPU over cuda.core: memory, a stream, recordings."""
