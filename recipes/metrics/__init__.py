"""What dense predictions are measured by."""
