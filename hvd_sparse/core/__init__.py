"""The path of a gradient; imports no framework. Start at `path`."""
