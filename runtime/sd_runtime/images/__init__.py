"""Pictures: to and from tensors, previews, what a picture says about itself, files on disk."""
