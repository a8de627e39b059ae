"""Adapters that open artifacts behind one Session interface, one runtime a file."""
