"""Decode steps in C++ for CPUs with int8 dot products, compiled on the user's machine."""
