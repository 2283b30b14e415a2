"""Your loop, any hardware, nothing in between."""
