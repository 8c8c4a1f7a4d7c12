"""The documentation: pages, what renders their tables and figures, and what MkDocs asks while it builds the site."""
