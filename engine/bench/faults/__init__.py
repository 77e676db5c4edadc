"""The fault rig: what goes wrong is drawn from a seed, what comes out is counted."""
