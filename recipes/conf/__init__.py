"""The Hydra configuration files, packaged so that they are found from any directory."""
