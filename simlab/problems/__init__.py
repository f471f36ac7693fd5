"""Problem families: parameter spaces and the linear systems they lead to. One module per PDE; see family.py."""
