"""The machines: what each side does next, as tables one can print. They decide and never act."""
