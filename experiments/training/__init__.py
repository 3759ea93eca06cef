"""How one run is trained: its method, its compiled parts, how it lies on devices, its loop."""
