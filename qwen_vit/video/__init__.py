"""Load any kind of video, sample frames, and cut frame pairs into patches."""
