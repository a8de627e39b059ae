"""The store of finished stages, and the bundle that is handed off. Imports no torch, no engine."""
