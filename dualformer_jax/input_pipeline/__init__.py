"""Where clips come from: NumPy, PyAV, OpenCV and Grain; nothing of Flax."""
