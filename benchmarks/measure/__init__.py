"""What every benchmark shares: the machine's facts, devices that time and count, statistics, and result files."""
