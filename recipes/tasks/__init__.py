"""One module per task; recipes.task defines the interface."""
