"""What a job may reach: nothing but the hosts that its agreement names and the owner allows."""
