"""Wrong rewrites, planted one at a time in copies of real passes, to see that each is caught."""
