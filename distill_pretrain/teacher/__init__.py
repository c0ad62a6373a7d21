"""Engine -> sampling -> cache: the capture job."""
