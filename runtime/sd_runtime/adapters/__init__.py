"""What is laid over a bundle at run time: words of textual inversions."""
