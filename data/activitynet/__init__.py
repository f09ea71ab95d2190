"""ActivityNet 1.3: 200 activities in untrimmed videos of YouTube."""
