"""One module a task; recipes.task says what a task is."""
