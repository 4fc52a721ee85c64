"""One question each: `python -m studies.long_context` reads long texts."""
