"""What happened, told once and in order: the outbox, its streams and its webhooks."""
