"""OmniSource: 200 classes of Kinetics, with videos of three sources."""
