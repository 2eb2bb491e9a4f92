"""What an operator does beside serving: set up, migrate, back up, restore, check, freeze."""
