"""All signed statements, a file for each stage of a session."""
