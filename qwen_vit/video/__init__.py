"""Any kind of video -> sampled frames -> patches of frame pairs."""
