"""The adapter on disk: reading, writing, exporting and inspecting it."""
