"""Links: one connection between two programs that carries all they have to say to each other."""
