"""Who sells what, as the overlay tells it: a hint for those who are not on the overlay."""
