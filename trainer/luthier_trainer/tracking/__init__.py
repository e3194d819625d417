"""Shows the course of a training in trackers such as TensorBoard: one file each, behind a bounded buffer."""
