"""Images and their labels from folders, lists and data sets, and reading them ahead of their use."""
