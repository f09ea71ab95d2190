"""Use of a trained model: predictions, maps, and drawing."""
