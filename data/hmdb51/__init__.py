"""HMDB51: 51 human actions, three splits."""
