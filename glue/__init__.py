"""GLUE: its tasks, files and metrics; any transformers encoder as a starting point."""
