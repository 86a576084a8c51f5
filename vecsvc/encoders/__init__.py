"""The kinds of encoder: text to vectors, one protocol."""
