"""Making a network smaller on purpose: what to cut, and how to make up for it."""
