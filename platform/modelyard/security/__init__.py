"""Who calls, what they may do, and how that is proved."""
