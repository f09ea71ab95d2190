"""HVU: videos of YouTube with tags of all that is to be seen in them."""
