"""The terminal workbench: everything that a person sees."""
