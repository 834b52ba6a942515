"""What this machine has, and what would be used."""
