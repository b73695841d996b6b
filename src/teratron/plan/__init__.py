"""Layouts seen before they run: what a step costs, and its picture."""
