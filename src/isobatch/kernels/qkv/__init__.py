"""What happens to packed queries, keys and values between their projection and attention, in one kernel."""
