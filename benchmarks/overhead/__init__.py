"""Cost of the suite per optimizer step: time, reads by the host, memory."""
