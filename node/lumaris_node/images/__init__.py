"""Images: where they come from, what is kept of them, and how they become a root folder."""
