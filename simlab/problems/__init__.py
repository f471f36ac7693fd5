"""Problem families: parameter spaces and their linear systems. One module per PDE."""
