"""UCF101: 101 human actions, three splits."""
