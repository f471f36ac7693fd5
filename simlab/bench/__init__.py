"""One module per published table, behind ``simlab bench NAME``."""
