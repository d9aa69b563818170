"""Load any kind of video, sample frames, and cut pairs into patches or keep frames for a GPU."""
