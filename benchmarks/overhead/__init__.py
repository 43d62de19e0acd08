"""What the suite costs per optimizer step: time, copies to the host, memory."""
