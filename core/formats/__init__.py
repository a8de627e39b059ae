"""The one home of each file format: validate, canonicalise, digest, size, load."""
