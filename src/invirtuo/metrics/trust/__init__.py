"""What a number is worth: whether a metric tells good predictions from bad ones, and what makes a score suspect."""
