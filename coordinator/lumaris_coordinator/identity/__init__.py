"""Who is who: keys proven by a challenge, certificates, and short-lived tokens."""
