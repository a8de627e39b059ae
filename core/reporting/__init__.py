"""The report: one self-contained page of what a bundle is, what was measured, and how it looks."""
